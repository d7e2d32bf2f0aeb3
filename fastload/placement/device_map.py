"""Device maps: which module of a model goes to which device. The one place that imports accelerate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastload.dtypes import to_torch
from fastload.errors import OptionError
from fastload.options import parse_dtype
from fastload.plan.planning import device_finder
from fastload.plan.slots import describe_modules, walk_modules

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "DeviceMapArgument",
    "Layout",
    "lay_out",
    "main_device",
    "named_devices",
    "on_one_device",
    "reject_other_devices",
    "remainder_as_budget",
    "resolve_device_map",
]

DeviceMapArgument = str | int | torch.device | Mapping[str, str | int | torch.device] | None

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


class Layout(NamedTuple):
    """Where the weights of a model go.

    Attributes:
        devices: module name -> device string, or "disk": what the caller's device map means.
        placed_on: the same for the load, which knows no disk: what is meant for it is mapped, or passes.
        memory_budget: the caller's, or the one that the device map means.
    """

    devices: dict[str, str]
    placed_on: dict[str, str]
    memory_budget: int | str | None

    @property
    def is_dispatched(self) -> bool:
        """Whether there are several devices, so that inputs must go from one to the next."""
        return len(set(self.placed_on.values())) > 1


def on_one_device(device: str | torch.device, memory_budget: int | str | None) -> Layout:
    """The layout of a module without a device map."""
    return Layout({"": str(device)}, {"": str(device)}, memory_budget)


def reject_other_devices(module: nn.Module, device: object, mesh_device: str | None) -> None:
    """Raise OptionError if something else than a device map says where the weights of a module go.

    Args:
        module: the module: it must have no memory yet.
        device: the device that the caller named; None for none.
        mesh_device: where its DTensors belong; None if it has none.
    """
    if device is not None or mesh_device is not None:
        raise OptionError(
            "a device map says where weights go, and so does something else",
            key="device_map",
            found="a module with DTensors" if device is None else f"device={str(device)!r}",
            fix="leave out device_map" if device is None else "leave out device",
        )
    held = next((name for name, parameter in module.named_parameters() if not parameter.is_meta), None)
    if held is not None:
        raise OptionError(
            "a device map is for a module that has no memory yet",
            key=held,
            expected="parameters on meta",
            fix="build the module under torch.device('meta'), or leave out device_map",
        )


def lay_out(
    model: nn.Module,
    device_map: DeviceMapArgument,
    max_memory: Mapping[int | str, int | str] | None,
    dtype: str | torch.dtype | None,
    memory_budget: int | str | None,
    whole: Collection[str],
) -> Layout:
    """What a device map and a memory budget mean for a model. Arguments and errors are those of `resolve_device_map`.

    What a strategy finds no room for on the only accelerator passes through it, within a memory budget. So does on the
    CPU what is meant for disk, if max_memory says how much memory there is.
    """
    known = parse_dtype(dtype)
    wanted = None if known is None else to_torch(known)
    devices = resolve_device_map(model, device_map, max_memory, wanted, whole)
    placed_on = devices
    if isinstance(device_map, str):
        placed_on, meant = remainder_as_budget(model, devices, wanted)
        memory_budget = meant if memory_budget is None else memory_budget
    accelerator = main_device(placed_on)
    if accelerator is None and "disk" in placed_on.values() and memory_budget is None:
        memory_budget = (max_memory or {}).get("cpu")
    # What lies on disk is mapped on the CPU: the kernel keeps of it what memory allows.
    placed_on = {name: "cpu" if device == "disk" else device for name, device in placed_on.items()}
    if accelerator is not None and len(set(placed_on.values())) > 1:
        placed_on = _taken_apart(model, placed_on, accelerator)
    return Layout(devices, placed_on, memory_budget)


def main_device(devices: Mapping[str, str]) -> str | None:
    """The first accelerator of a map: what is on the CPU or on disk computes there. None if it has none."""
    return next((device for device in devices.values() if device not in ("cpu", "disk")), None)


def resolve_device_map(
    model: nn.Module,
    device_map: DeviceMapArgument,
    max_memory: Mapping[int | str, int | str] | None,
    dtype: torch.dtype | None,
    whole: Collection[str] = (),
) -> dict[str, str]:
    """module name -> device string, from any of the forms that transformers accepts.

    Args:
        model: the skeleton.
        device_map: a strategy, one device, a mapping, or None for the CPU.
        max_memory: device -> limit, as accelerate spells it; for strategies only.
        dtype: the type the model will have.
        whole: names of module classes that stay whole on one device, unless the model says which do.

    Raises:
        OptionError: an unknown strategy, device or module, a device that is not there, or a parameter that the map
            says nothing of.
    """
    if device_map is None:
        if max_memory is not None:
            raise OptionError("max_memory limits what a strategy may use", fix="pass device_map='auto' with it")
        return {"": "cpu"}
    if isinstance(device_map, Mapping):
        devices = {name: _device_name(device) for name, device in device_map.items()}
        _check_names(model, devices)
        return devices
    if not isinstance(device_map, str) or device_map not in _STRATEGIES:
        return {"": _device_name(device_map)}
    if max_memory is None and not torch.accelerator.is_available():
        return {"": "cpu"}
    return _infer(model, device_map, max_memory, dtype, getattr(model, "_no_split_modules", None) or whole)


def remainder_as_budget(
    model: nn.Module, devices: Mapping[str, str], dtype: torch.dtype | None
) -> tuple[dict[str, str], int | None]:
    """The map and the memory budget for what a strategy laid out over one accelerator and something beside it.

    What does not fit on the accelerator then comes there for each forward, the next block while one computes (see
    `fastload.streaming.budget`), in place of hooks that wait for each module.

    Args:
        model: the skeleton.
        devices: module name -> device string.
        dtype: the type that its floating point weights will have; None for that of the skeleton.

    Returns:
        That map and None, if there are several accelerators, or none, or nothing beside one.
    """
    accelerators = set(devices.values()) - {"cpu", "disk"}
    if len(accelerators) != 1 or len(set(devices.values())) == 1:
        return dict(devices), None
    (accelerator,) = accelerators
    device_of = device_finder(devices)
    n_bytes = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if device_of(name) == accelerator:
            itemsize = dtype.itemsize if dtype is not None and tensor.is_floating_point() else tensor.itemsize
            n_bytes += tensor.numel() * itemsize
    return {"": accelerator}, n_bytes


def named_devices(device_map: DeviceMapArgument) -> list[str]:
    """The devices that a device map names before there is a model; of a strategy the accelerator, if there is one.

    Raises:
        OptionError: an unknown device, or one that is not there.
    """
    if isinstance(device_map, Mapping):
        return [_device_name(device) for device in device_map.values() if device != "disk"]
    if device_map in _STRATEGIES:
        return ["cuda"] if torch.cuda.is_available() else []
    return [] if device_map is None else [_device_name(device_map)]


def _check_names(model: nn.Module, devices: Mapping[str, str]) -> None:
    """Raise OptionError unless a map names modules and tensors of a model, and all of it."""
    modules = walk_modules(model)
    slots = describe_modules(modules)
    unknown = [name for name in devices if name not in modules and name not in slots]
    if unknown:
        raise OptionError(
            "device_map names what the model does not have",
            key=unknown[0],
            expected="names of modules, such as " + ", ".join(repr(name) for name in list(model._modules)[:3]),
            found=f"{len(unknown)} other names" if len(unknown) > 1 else repr(unknown[0]),
        )
    where = device_finder({"": "", **devices})
    left = [fqn for fqn, slot in slots.items() if slot.persistent and not where(fqn)]
    if left:
        raise OptionError(
            "device_map says nothing of some of the model's tensors",
            key=left[0],
            found=f"{len(left)} tensors in no module of the map",
            fix="name the modules that they are in, or '' for all that is not named",
        )


def _taken_apart(model: nn.Module, devices: Mapping[str, str], accelerator: str) -> dict[str, str]:
    """A map of which no module holds another one, for hooks.

    Tensors that a module holds beside others that are named have no hook that could bring them: they are not left on
    the CPU.
    """
    modules = walk_modules(model)
    device_of = device_finder(devices)
    apart = {""}
    for name in devices:
        while name := name.rpartition(".")[0]:
            apart.add(name)
    found: dict[str, str] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        if prefix not in apart:
            found[prefix] = device_of(prefix)
            continue
        module, dot = modules[prefix], f"{prefix}." if prefix else ""
        for name in (*module._parameters, *module._buffers):
            device = device_of(dot + name)
            found[dot + name] = accelerator if device == "cpu" else device
        pending += [dot + name for name, child in reversed(module._modules.items()) if child is not None]
    return found


def _infer(
    model: nn.Module,
    strategy: str,
    max_memory: Mapping[int | str, int | str] | None,
    dtype: torch.dtype | None,
    whole: Collection[str],
) -> dict[str, str]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    no_split: Any = sorted(whole)
    limits = dict(max_memory) if max_memory is not None else None
    if strategy == "sequential":
        budget = get_max_memory(limits)
    else:
        budget = get_balanced_memory(
            model,
            max_memory=limits,
            no_split_module_classes=no_split,
            dtype=dtype,
            low_zero=strategy == "balanced_low_0",
        )
    inferred = infer_auto_device_map(model, max_memory=budget, no_split_module_classes=no_split, dtype=dtype)
    return {name: _device_name(device) for name, device in inferred.items()}


def _device_name(device: str | int | torch.device) -> str:
    if device == "disk":
        return "disk"
    try:
        if isinstance(device, int):
            accelerator = torch.accelerator.current_accelerator()
            return str(torch.device(accelerator.type if accelerator else "cuda", device))
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(
            "unknown device in device_map",
            expected=f"a device, 'disk', or one of {', '.join(_STRATEGIES)}",
            found=repr(device),
        ) from error
    accelerator = torch.accelerator.current_accelerator()
    kind, n_devices = (accelerator.type, torch.accelerator.device_count()) if accelerator else ("cuda", 0)
    if found.type != "cpu" and (found.type != kind or (found.index or 0) >= n_devices):
        raise OptionError(
            "device_map names a device that this machine does not have",
            expected=f"one of {n_devices} {kind} devices, or 'cpu'",
            found=str(found),
        )
    return str(found)
