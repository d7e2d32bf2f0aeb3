"""The ending of a load: transformers' own, and what it leaves without values.

Tensors that no file has (a new head, buffers that a constructor computes) were made on meta. transformers makes them
anew, uninitialised, and relies on `_init_weights` to write them; a class whose author did not know that keeps garbage,
and tensors that are plain attributes stay on meta. Here what nobody wrote is taken from a model that is built for real.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from fastload.errors import IncompleteModelError
from fastload.plan.slots import walk_modules
from fastload.reports import collapse_keys

__all__ = ["finish"]

_MOVE = "_move_missing_keys_from_meta_to_device"
_Modules = Mapping[str, nn.Module]
# Attributes that hold parameters, buffers, modules and hooks.
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def finish(model: Any, asked: Any, info: Any, rebuild: Callable[[], Any] | None) -> Any:
    """End a load as `PreTrainedModel._finalize_model_loading` does, and leave nothing without a value.

    torch counts the writes to a tensor. One that was made here and has as many as then was written by nobody.

    Args:
        model: the model, its weights placed.
        asked: transformers' LoadStateDictConfig.
        info: what is missing, unexpected, mismatched.
        rebuild: builds the model once more.

    Returns:
        transformers' info.

    Raises:
        IncompleteModelError: something has no values even then.
    """
    modules = walk_modules(model)
    made: dict[str, tuple[torch.Tensor, int]] = {}
    move = getattr(model, _MOVE)

    def move_and_remember(missing: set[str], *args: Any, **kwargs: Any) -> None:
        move(missing, *args, **kwargs)
        names = [*(missing - model.all_tied_weights_keys.keys()), *_computed_buffers(modules)]
        for name in names:
            tensor = _tensor(modules, name)
            # Those made in inference mode count no writes.
            if tensor is not None and not tensor.is_inference():
                made[name] = tensor, tensor._version

    _mark_loaded_modules(modules)
    model.__dict__[_MOVE] = move_and_remember
    try:
        info = type(model)._finalize_model_loading(model, asked, info)
    finally:
        del model.__dict__[_MOVE]
    untouched = [
        name
        for name, (tensor, version) in made.items()
        if tensor is _tensor(modules, name) and tensor._version == version and tensor.numel()
    ]
    if untouched or any(_meta_attributes(modules)):
        _complete(model, modules, untouched, rebuild)
    return info


def _complete(model: Any, modules: _Modules, untouched: list[str], rebuild: Callable[[], Any] | None) -> None:
    """Give tensors and attributes without values those of a model that is built for real."""
    if rebuild is not None:
        # Only parameters and what is saved beside them may need an initialiser.
        is_initialised = not set(untouched) <= set(_computed_buffers(modules))
        twins = walk_modules(_built_for_real(model, rebuild, is_initialised))
        with torch.no_grad():
            for name in untouched:
                source = _tensor(twins, name)
                if source is not None and not source.is_meta:
                    _tensor(modules, name).copy_(source)  # type: ignore[union-attr]
        for prefix, name in list(_meta_attributes(modules)):
            attributes = modules[prefix].__dict__
            device = _device_of(modules[prefix], model)
            attributes[name] = _filled(attributes[name], twins[prefix].__dict__.get(name), device)
    left = [f"{prefix}.{name}".lstrip(".") for prefix, name in _meta_attributes(modules)]
    if left:
        raise IncompleteModelError(
            "the model would not be whole: tensors that its constructor computes on meta",
            key=", ".join(collapse_keys(left)),
            expected="values",
            found=f"{len(left)} tensors without",
            fix="register them as buffers, or compute them with device='cpu'",
        )


def _mark_loaded_modules(modules: _Modules) -> None:
    """Tell transformers that torch's own modules whose tensors are all loaded need no `_init_weights`.

    It would call that for each, and find every tensor marked as loaded. Other modules may compute something there; and
    where a weight is computed from parameters (weight norm), what it draws from the random generator counts.
    """
    for module in modules.values():
        if type(module).__module__.startswith("torch.nn.modules.") and not module._forward_pre_hooks:
            tensors = [*module._parameters.values(), *module._buffers.values()]
            if all(tensor is None or getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
                module._is_hf_initialized = True  # type: ignore[assignment]


def _built_for_real(model: Any, rebuild: Callable[[], Any], is_initialised: bool) -> Any:
    """The model once more, on the CPU. Without initialisers its parameters are allocated and not written."""
    dtype = torch.get_default_dtype()
    initialisers = nullcontext() if is_initialised else no_init_weights()
    with _said_once(), torch.device("cpu"), torch.random.fork_rng(devices=[]), initialisers:
        torch.set_default_dtype(model.config.dtype if isinstance(model.config.dtype, torch.dtype) else dtype)
        try:
            return rebuild()
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def _said_once() -> Iterator[None]:
    """What a constructor logs in this thread was logged when it ran first."""
    me = threading.get_ident()

    def is_others(record: logging.LogRecord) -> bool:
        return record.thread != me

    handlers = list(logging.getLogger("transformers").handlers)
    for handler in handlers:
        handler.addFilter(is_others)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_others)


def _tensor(modules: _Modules, name: str) -> torch.Tensor | None:
    """A parameter or buffer by name."""
    prefix, _, last = name.rpartition(".")
    module = modules[prefix]
    parameter = module._parameters.get(last)
    return module._buffers.get(last) if parameter is None else parameter


def _computed_buffers(modules: _Modules) -> Iterator[str]:
    """Names of the buffers that no file has."""
    for prefix, module in modules.items():
        for name in module._non_persistent_buffers_set:
            yield f"{prefix}.{name}" if prefix else name


def _meta_attributes(modules: _Modules) -> Iterator[tuple[str, str]]:
    """(module, attribute) of tensors on meta that are neither parameters nor buffers, also in lists, tuples, dicts."""
    for prefix, module in modules.items():
        for name, value in module.__dict__.items():
            if name not in _OF_EVERY_MODULE and _has_meta(value) and not _are_parameters(value, module):
                yield prefix, name


def _are_parameters(value: Any, module: nn.Module) -> bool:
    """Whether this is a list of the module's own parameters, as recurrent modules keep one. They may stay on disk."""
    own = {id(parameter) for parameter in module._parameters.values()}
    return type(value) is list and own.issuperset(map(id, value))


def _has_meta(value: Any) -> bool:
    kind = type(value)
    if kind in (list, tuple):
        return any(map(_has_meta, value))
    if kind is dict:
        return any(map(_has_meta, value.values()))
    return isinstance(value, torch.Tensor) and value.is_meta


def _filled(value: Any, twin: Any, device: torch.device) -> Any:
    """A value with tensors on meta replaced by those of a like one that has values."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return twin.to(device) if value.is_meta and isinstance(twin, torch.Tensor) and not twin.is_meta else value
    if kind is not type(twin) or kind not in (list, tuple, dict) or len(value) != len(twin):
        return value
    if kind is dict:
        return {key: _filled(held, twin.get(key), device) for key, held in value.items()}
    return kind(_filled(held, other, device) for held, other in zip(value, twin, strict=True))


def _device_of(module: nn.Module, model: nn.Module) -> torch.device:
    """Where a module's own tensors are, or else the model's first."""
    for owner in (module, model):
        for tensor in (*owner.parameters(), *owner.buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")
