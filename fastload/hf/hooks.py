"""Hooks in place of accelerate's, for modules whose weights a device map leaves elsewhere than they compute.

accelerate's fetches every tensor in the forward that needs it, one after the other, waits for each, and has torch give
unused device memory back after each. This one takes the tensors of a whole block, which came while the block before
computed. It is a hook of accelerate's kind all the same, with the same attributes: what saves a model, adapts it or
takes it apart knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import find_device, named_module_tensors, send_to_device
from torch import nn
from torch._compile import _disable_dynamo  # as torch.compiler.disable, which imports the compiler at once

from fastload.placement.modules import give

__all__ = ["Passing", "offloading_hooks", "replace_hooks"]

Take = Callable[[str], Mapping[str, torch.Tensor]]
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


def replace_hooks(found: Iterable[tuple[str, str, Passing]], take: Take) -> None:
    """Put hooks in the place of accelerate's.

    Args:
        found: (name of the module, name of its unit, the module).
        take: gives the tensors of a unit by their names in the model.
    """
    for prefix, unit, (module, hook, _) in found:
        made = _BroughtByBlock(hook, f"{prefix}." if prefix else "", unit, take)
        whole = module._hf_hook
        if isinstance(whole, SequentialHook):
            whole.hooks = tuple(made if single is hook else single for single in whole.hooks)
        else:
            module._hf_hook = made


class _BroughtByBlock(AlignDevicesHook):  # type: ignore[misc]
    """Gives a module its tensors before its forward, and takes them away after it."""

    def __init__(self, replaced: Any, prefix: str, unit: str, take: Take) -> None:
        super().__init__(**{name: getattr(replaced, name) for name in _TAKEN_OVER})
        self.original_devices = replaced.original_devices
        self._home = replaced.execution_device
        self._prefix = prefix
        self._unit = unit
        self._take = take
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
                    self._at_rest[name] = _like(old, torch.empty_like(old, device="meta"))
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
