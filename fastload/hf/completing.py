"""The ending of a load: transformers' own, and what it leaves without values.

Buffers that no file has are computed by a constructor, which ran on meta. transformers makes them anew, uninitialised,
and relies on `_init_weights` to compute them; a class whose author did not know that keeps garbage, and tensors that
are plain attributes stay on meta. Here whatever nobody wrote is taken from a model that was built for real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from fastload.errors import IncompleteModelError
from fastload.plan.slots import walk_modules
from fastload.reports import collapse_keys

__all__ = ["complete", "finalize"]

_MOVE = "_move_missing_keys_from_meta_to_device"


def finalize(model: Any, asked: Any, info: Any) -> tuple[Any, list[str]]:
    """transformers' ending. Returns its info, and the names of buffers that it made and did not write.

    torch counts the writes to a tensor; a buffer that is still the one that was made, and was never written, has none.
    """
    made: dict[str, torch.Tensor] = {}
    move = getattr(model, _MOVE)

    def move_and_remember(*args: Any, **kwargs: Any) -> None:
        move(*args, **kwargs)
        made.update(_computed_buffers(model))

    _mark_loaded_modules(model)
    model.__dict__[_MOVE] = move_and_remember
    try:
        info = PreTrainedModel._finalize_model_loading(model, asked, info)
    finally:
        del model.__dict__[_MOVE]
    now = dict(_computed_buffers(model))
    untouched = [
        name for name, tensor in made.items() if now.get(name) is tensor and not tensor._version and tensor.numel()
    ]
    return info, untouched


def complete(model: Any, untouched: Iterable[str], rebuild: Callable[[], Any] | None) -> None:
    """Give buffers and attributes without values those of a model that is built for real.

    Args:
        model: the model, loaded.
        untouched: names of buffers that hold whatever was in memory.
        rebuild: builds the model once more.

    Raises:
        IncompleteModelError: something has no values even then.
    """
    attributes = list(_meta_attributes(model))
    if not untouched and not attributes:
        return
    twin = _built_for_real(model, rebuild) if rebuild is not None else model
    owners, twins = walk_modules(model), walk_modules(twin)
    with torch.no_grad():
        for name in untouched:
            prefix, _, last = name.rpartition(".")
            source = twins[prefix]._buffers[last]
            if source is not None and not source.is_meta:
                owners[prefix]._buffers[last].copy_(source)  # type: ignore[union-attr]
    for prefix, name in attributes:
        source = twins[prefix].__dict__.get(name)
        if isinstance(source, torch.Tensor) and not source.is_meta:
            owners[prefix].__dict__[name] = source.to(_device_of(owners[prefix], model))
    left = [f"{prefix}.{name}".lstrip(".") for prefix, name in _meta_attributes(model)]
    if left:
        raise IncompleteModelError(
            "the model would not be whole: tensors that its constructor computes on meta",
            key=", ".join(collapse_keys(left)),
            expected="values",
            found=f"{len(left)} tensors without",
            fix="register them as buffers, or compute them with device='cpu'",
        )


def _mark_loaded_modules(model: nn.Module) -> None:
    """Tell transformers that torch's own modules whose tensors are all loaded need no `_init_weights`.

    It would call that for each, and find every tensor marked as loaded. Other modules may compute something there.
    """
    for module in walk_modules(model).values():
        if type(module).__module__.startswith("torch.nn."):
            tensors = [*module._parameters.values(), *module._buffers.values()]
            if all(tensor is None or getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
                module._is_hf_initialized = True  # type: ignore[assignment]


def _built_for_real(model: Any, rebuild: Callable[[], Any]) -> Any:
    """The model once more, on the CPU; its parameters are allocated, and not written."""
    dtype = torch.get_default_dtype()
    with torch.device("cpu"), no_init_weights(), torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(model.config.dtype if isinstance(model.config.dtype, torch.dtype) else dtype)
        try:
            return rebuild()
        finally:
            torch.set_default_dtype(dtype)


def _computed_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in walk_modules(model).items():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _meta_attributes(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(module, attribute) of tensors on meta that are neither parameters nor buffers."""
    for prefix, module in walk_modules(model).items():
        for name, value in module.__dict__.items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                yield prefix, name


def _device_of(module: nn.Module, model: nn.Module) -> torch.device:
    """Where a module's own tensors are, or else the model's first."""
    for owner in (module, model):
        for tensor in (*owner.parameters(), *owner.buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")
