"""What a checkpoint can hold: tensors and text, checked before a file is touched."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastload import dtypes
from fastload.errors import OptionError, SaveError, UnknownDtypeError
from fastload.storage.sharing import byte_span

__all__ = ["checked_metadata", "checked_tensors"]


def checked_tensors(state_dict: Mapping[str, torch.Tensor], deferred: Container[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors without their gradients, each one that a file can hold; an error names all others."""
    tensors: dict[str, torch.Tensor] = {}
    on_meta, problems = [], []
    for key, value in state_dict.items():
        problem = _problem(key, value)
        if problem is not None:
            problems.append(f"{key!r} {problem}")
        elif key not in deferred and (value.is_meta or value.untyped_storage().device.type == "meta"):
            on_meta.append(key)
        else:
            tensors[key] = value.detach().resolve_conj().resolve_neg()
    if problems:
        raise OptionError(
            "the state dict holds what a checkpoint cannot",
            expected="tensors by name, each dense and on one device",
            found="; ".join(problems),
            fix="leave these out, or convert them",
        )
    if on_meta:
        raise SaveError(
            f"{len(on_meta)} tensors are on the meta device and have no values to save",
            expected="tensors with values",
            found=", ".join(on_meta),
            fix="load or initialise them first",
        )
    return tensors


def _problem(key: object, value: object) -> str | None:
    """Why this cannot be saved; None if it can."""
    if not isinstance(key, str):
        return "is no text, as a name must be"
    if not isinstance(value, torch.Tensor):
        return f"is no tensor but {type(value).__name__}"
    if _is_wrapper(value):
        return f"is of {type(value).__name__}, which stands for tensors elsewhere (a DTensor has full_tensor())"
    if value.is_quantized:
        return "is quantised (dequantize() makes a plain tensor)"
    if value.layout != torch.strided or value.is_nested:
        return "is sparse or nested (to_dense() makes a plain tensor)"
    try:
        dtypes.from_torch(value.dtype)
    except UnknownDtypeError:
        return f"is of {value.dtype}, which no checkpoint format holds"
    if not value.is_meta and byte_span(value)[1] > value.untyped_storage().nbytes():
        return "has no memory (it was released; FSDP gathers parameters with summon_full_params)"
    return None


def _is_wrapper(value: torch.Tensor) -> bool:
    return is_traceable_wrapper_subclass(value)


def checked_metadata(metadata: Mapping[str, object]) -> dict[str, str]:
    """The text by name. OptionError if it is something else."""
    texts = {name: text for name, text in metadata.items() if isinstance(name, str) and isinstance(text, str)}
    if len(texts) != len(metadata):
        others = [repr(item) for item in metadata.items() if item[0] not in texts]
        raise OptionError("metadata is text by name", expected="str for each str", found=", ".join(others))
    return texts
