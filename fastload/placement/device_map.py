"""Device maps: which module of a model goes to which device. The one place that imports accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fastload.errors import OptionError
from fastload.plan.planning import device_finder

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DeviceMapArgument", "dispatch", "named_devices", "remainder_as_budget", "resolve_device_map"]

DeviceMapArgument = str | int | torch.device | Mapping[str, str | int | torch.device] | None

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def resolve_device_map(
    model: nn.Module,
    device_map: DeviceMapArgument,
    max_memory: Mapping[int | str, int | str] | None,
    dtype: torch.dtype | None,
) -> dict[str, str]:
    """module name -> device string, from any of the forms that transformers accepts.

    Args:
        model: the skeleton.
        device_map: a strategy, one device, a mapping, or None for the CPU.
        max_memory: device -> limit, as accelerate spells it; for strategies only.
        dtype: the type the model will have.

    Raises:
        OptionError: an unknown strategy or device, or a device that is not there.
    """
    if device_map is None:
        if max_memory is not None:
            raise OptionError("max_memory limits what a strategy may use", fix="pass device_map='auto' with it")
        return {"": "cpu"}
    if isinstance(device_map, Mapping):
        return {name: _device_name(device) for name, device in device_map.items()}
    if not isinstance(device_map, str) or device_map not in _STRATEGIES:
        return {"": _device_name(device_map)}
    if max_memory is None and not torch.accelerator.is_available():
        return {"": "cpu"}
    return _infer(model, device_map, max_memory, dtype)


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


def dispatch(model: nn.Module, device_map: Mapping[str, str]) -> None:
    """Install accelerate's hooks where a model lies on several devices; a model on one device needs none."""
    # What lies on disk is mapped on the CPU: the kernel keeps of it what memory allows.
    devices = {name: "cpu" if device == "disk" else device for name, device in device_map.items()}
    if len(set(devices.values())) < 2:
        return
    from accelerate import dispatch_model

    dispatch_model(model, devices)


def _infer(
    model: nn.Module,
    strategy: str,
    max_memory: Mapping[int | str, int | str] | None,
    dtype: torch.dtype | None,
) -> dict[str, str]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    no_split: Any = sorted(getattr(model, "_no_split_modules", None) or ())
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
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            "device_map names a device that this machine does not have",
            expected=f"one of {torch.cuda.device_count()} CUDA devices, or 'cpu'",
            found=str(found),
        )
    return str(found)
