"""Hooks in place of accelerate's, for modules whose weights a device map leaves elsewhere than they compute.

accelerate's fetches every tensor in the forward that needs it, one after the other, waits for each, and has torch give
unused device memory back after each. This one takes the tensors of a whole block, which came while the block before
computed. It is a hook of accelerate's kind all the same, with the same attributes: what saves a model, adapts it or
takes it apart knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from accelerate.utils import PrefixedDataset, find_device, named_module_tensors, send_to_device
from torch import nn
from torch._compile import _disable_dynamo  # as torch.compiler.disable, which imports the compiler at once

from fastload.placement.device_map import main_device
from fastload.placement.modules import give
from fastload.plan.planning import device_finder
from fastload.plan.slots import walk_modules

__all__ = ["Passing", "add_hooks", "offloading_hooks", "replace_hooks"]

Take = Callable[[str], Mapping[str, torch.Tensor]]
# (number of a tensor, where it went) -> it, so that the number stays its own, and what it became there.
_Moved = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
_TAKEN_OVER = (
    "execution_device",
    "offload",
    "io_same_device",
    "weights_map",
    "offload_buffers",
    "place_submodules",
    "skip_keys",
)


class Passing(NamedTuple):
    """A module whose weights are brought for its forward.

    Attributes:
        module: the module.
        hook: accelerate's, which would bring them.
        names: its tensors, by their names in the model.
    """

    module: nn.Module
    hook: Any
    names: list[str]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.hook.execution_device)


def offloading_hooks(model: nn.Module) -> Iterator[tuple[str, Passing]]:
    """The modules of a dispatched model, by name, whose hooks bring weights from a map."""
    for prefix, module in model.named_modules():
        for hook in _single(getattr(module, "_hf_hook", None)):
            if type(hook) is AlignDevicesHook and hook.offload and hasattr(hook.weights_map, "dataset"):
                dot = f"{prefix}." if prefix else ""
                yield prefix, Passing(module, hook, [dot + name for name, _ in _tensors(module, hook)])


def add_hooks(
    model: nn.Module,
    device_map: Mapping[str, str],
    whole: Collection[str],
    weights: Mapping[str, torch.Tensor],
    in_memory: dict[str, torch.Tensor],
) -> dict[str, Passing]:
    """Give the modules of a model that lies on several devices hooks that take inputs to where they compute.

    The weights are where they belong, and nothing is moved but what is tied to a tensor on another device. What is on
    the CPU computes on the first accelerator: it is put on meta, unless it is tied to a tensor that stays, and left to
    be brought for each forward.

    Args:
        model: the model.
        device_map: module name -> device; no module of it holds another one.
        whole: names of module classes whose weights come together, for their forward uses those of modules in them.
        weights: name -> the tensor, for those that are to be brought.
        in_memory: gets those of them that have memory.

    Returns:
        The modules whose weights are to be brought, by name, for `replace_hooks`.
    """
    main = main_device(device_map)
    assert main is not None
    device_of = device_finder({"": "", **device_map})
    moved: _Moved = {}
    walked = [(name, module) for name, module in walk_modules(model).items() if _has_tensors(module)]
    places = {name: main if not name else _place(name, module, device_of) for name, module in walked}
    for name, module in walked:
        if places[name] not in ("", "cpu") and not hasattr(module, "_hf_hook"):
            for own, tensor in named_module_tensors(module):
                _put(module, own, _on(places[name], tensor, moved))
            add_hook_to_module(module, _Aligning(places[name], io_same_device=not name))
    found: dict[str, Passing] = {}
    within = "/"  # of a block that comes whole: what is in it needs no hook
    for name, module in walked:
        if places[name] != "cpu" or name.startswith(within) or hasattr(module, "_hf_hook"):
            continue
        is_whole = type(module).__name__ in whole
        within = f"{name}." if is_whole else within
        hook = _Aligning(
            main,
            offload=is_whole or bool(module._parameters),
            place_submodules=is_whole,
            weights_map=PrefixedDataset(weights, f"{name}."),
        )
        add_hook_to_module(module, hook)
        for own, buffer in list(module.named_buffers(recurse=is_whole)):
            _put(module, own, _on(main, buffer, moved))
        if hook.offload:
            found[name] = _at_rest(name, module, hook, in_memory, moved)
    return found


def _at_rest(name: str, module: nn.Module, hook: Any, in_memory: dict[str, torch.Tensor], moved: _Moved) -> Passing:
    """Have a module lie as it does between forwards. What of it has memory is kept elsewhere."""
    held = _tensors(module, hook)
    for own, tensor in held:
        if not tensor.is_meta:
            staying = _staying(tensor, moved)
            in_memory[f"{name}.{own}"] = (tensor if staying is None else staying).detach()
            _put(module, own, _on("meta", tensor, moved) if staying is None else staying)
    # Where what takes a hook away puts the weights.
    hook.original_devices = {own: torch.device("cpu") for own, _ in held}
    return Passing(module, hook, [f"{name}.{own}" for own, _ in held])


def replace_hooks(found: Iterable[tuple[str, str, Passing]], take: Take, *, keep_ties: bool) -> None:
    """Put hooks in the place of accelerate's.

    Args:
        found: (name of the module, name of its unit, the module).
        take: gives the tensors of a unit by their names in the model.
        keep_ties: put the parameters that were there before a forward back after it, so that what is tied stays tied;
            accelerate puts others there.
    """
    for prefix, unit, (module, hook, _) in found:
        made = _BroughtByBlock(hook, f"{prefix}." if prefix else "", unit, take, keep_ties)
        whole = module._hf_hook
        if isinstance(whole, SequentialHook):
            whole.hooks = tuple(made if single is hook else single for single in whole.hooks)
        else:
            module._hf_hook = made


class _Aligning(AlignDevicesHook):  # type: ignore[misc]
    """Takes inputs to where a module computes, whose weights are there already."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Nothing: nothing is to be moved."""
        return module


class _BroughtByBlock(AlignDevicesHook):  # type: ignore[misc]
    """Gives a module its tensors before its forward, and takes them away after it."""

    def __init__(self, replaced: Any, prefix: str, unit: str, take: Take, keep_ties: bool) -> None:
        super().__init__(**{name: getattr(replaced, name) for name in _TAKEN_OVER})
        self.original_devices = replaced.original_devices
        self._home = replaced.execution_device
        self._prefix = prefix
        self._unit = unit
        self._take = take
        self._keeps_ties = keep_ties
        self._at_rest: dict[str, torch.Tensor] = {}

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Nothing: the module is as the replaced hook left it."""
        return module

    @_disable_dynamo
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The weights, and inputs where they are."""
        if self.io_same_device:
            self.input_device = find_device([args, kwargs])
        # What saves a model asks for its weights elsewhere than they compute.
        brought = self._take(self._unit) if self.execution_device == self._home else {}
        # Parameters that are made in inference mode could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            for name, old in _tensors(module, self):
                tensor = brought.get(self._prefix + name)
                if tensor is None:
                    tensor = self.weights_map[name]
                if name not in self._at_rest:
                    empty = _like(old, torch.empty_like(old, device="meta"))
                    self._at_rest[name] = old if self._keeps_ties else empty
                _put(module, name, _like(old, tensor.to(self.execution_device, old.dtype)))
        return send_to_device(args, self.execution_device), send_to_device(
            kwargs, self.execution_device, skip_keys=self.skip_keys
        )

    @_disable_dynamo
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Without the weights again, and the output where the input was, if that is asked for."""
        for name, tensor in self._at_rest.items():
            _put(module, name, tensor)
        if self.io_same_device and self.input_device is not None:
            output = send_to_device(output, self.input_device, skip_keys=self.skip_keys)
        return output


def _single(hook: Any) -> tuple[Any, ...]:
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _has_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _place(name: str, module: nn.Module, device_of: Callable[[str], str]) -> str:
    """Where a map has a module, or the tensors that it holds itself; "" for what is only named in parts."""
    own = next((f"{name}.{own}" for own, _ in named_module_tensors(module)), "")
    return device_of(name) or device_of(own)


def _on(place: str, tensor: torch.Tensor, moved: _Moved) -> torch.Tensor:
    """A tensor at a place. One that has several names is moved once."""
    if tensor.device == torch.device(place):
        return tensor
    if (id(tensor), place) not in moved:
        moved[id(tensor), place] = tensor, _like(tensor, tensor.detach().to(place))
    return moved[id(tensor), place][1]


def _staying(tensor: torch.Tensor, moved: _Moved) -> torch.Tensor | None:
    """The tensor on an accelerator that another one is tied to: they stay one."""
    found = (new for (number, place), (_, new) in moved.items() if number == id(tensor) and place != "meta")
    return next(found, None)


def _tensors(module: nn.Module, hook: Any) -> list[tuple[str, torch.Tensor]]:
    """What a hook brings."""
    return list(
        named_module_tensors(
            module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
        )
    )


def _like(old: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter where the old one is a parameter."""
    if not isinstance(old, nn.Parameter):
        return tensor
    made = nn.Parameter(tensor, old.requires_grad)
    if hasattr(old, "_is_hf_initialized"):
        made._is_hf_initialized = old._is_hf_initialized  # type: ignore[attr-defined]
    return made


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, last = name.rpartition(".")
    give(module.get_submodule(owner), last, tensor)
