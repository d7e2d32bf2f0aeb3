"""Tensors that have to be made before they can be written, made without needing memory for all of them.

A converted copy of a checkpoint is as large as a model. It is written to a file without a name, on the file system
that the result goes to: its pages belong to the page cache, which the kernel can empty, and it is gone with the
process whatever ends it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from math import prod

import torch

from fastload.checkpoint import Checkpoint
from fastload.dtypes import DType, to_torch
from fastload.formats.specs import FusedSpec, TensorSpec
from fastload.progress import Progress
from fastload.storage.assembling import assemble, write_tensor
from fastload.storage.atomic import save_error
from fastload.storage.mapping import is_mappable

__all__ = ["convert_into_scratch"]

_ALIGNMENT_BYTES = mmap.PAGESIZE


def convert_into_scratch(checkpoint: Checkpoint, dtype: DType | None, folder: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, ready to be written.

    Those that need no change are views of the checkpoint's files. Those that are converted, compressed, byte-swapped,
    misaligned or in chunks stand in a nameless file. Tensors that were the same memory still are.

    Args:
        checkpoint: what to take them from.
        dtype: type for floating point tensors; None for the one they have.
        folder: where the result will be written, which may not exist yet.

    Raises:
        SaveError: there is no room for the scratch file.
        FormatError: a tensor cannot be decoded.
    """
    specs = {key: checkpoint.spec(key) for key in checkpoint}
    made = _what_to_make(specs, dtype)
    sizes = {keys[0]: prod(specs[keys[0]].shape) * wanted.itemsize for wanted, keys in made}
    offsets, n_scratch_bytes = _lay_out(sizes)
    scratch = _scratch_file(folder, n_scratch_bytes) if n_scratch_bytes else None
    tensors: dict[str, torch.Tensor] = {}
    with Progress("converting", n_scratch_bytes) as progress, torch.no_grad():
        for wanted, keys in made:
            first = keys[0]
            tensor = _room(scratch, specs[first].shape, wanted, offsets[first])
            _fill(tensor, specs[first], checkpoint)
            if scratch is not None and sizes[first]:
                # Written pages stay in the page cache, but leave this process.
                scratch.madvise(mmap.MADV_DONTNEED, offsets[first], sizes[first])
            tensors |= dict.fromkeys(keys, tensor)
            progress.advance(sizes[first])
    return {key: tensors[key] if key in tensors else checkpoint[key] for key in specs}


def _what_to_make(specs: Mapping[str, TensorSpec | FusedSpec], dtype: DType | None) -> list[tuple[DType, list[str]]]:
    """The tensors that cannot be written as they lie: (type, keys), with keys that are one tensor together."""
    made: dict[tuple[object, ...], tuple[DType, list[str]]] = {}
    for key, spec in specs.items():
        wanted = dtype if dtype is not None and spec.dtype.castable else spec.dtype
        if wanted is not spec.dtype or isinstance(spec, FusedSpec) or not is_mappable(spec):
            made.setdefault(spec[1:], (wanted, []))[1].append(key)
    return list(made.values())


def _lay_out(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and where the last one ends, in bytes."""
    offsets: dict[str, int] = {}
    end = 0
    for key, n_bytes in sizes.items():
        offsets[key] = end
        end += -(-n_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return offsets, end


def _scratch_file(folder: str, n_bytes: int) -> mmap.mmap:
    """A nameless file of this size, mapped. Its room is taken at once: a disk that fills up later would be a SIGBUS."""
    place = os.path.abspath(folder)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
            return mmap.mmap(file.fileno(), n_bytes)
    except OSError as error:
        raise save_error(folder, error, "be given the room for converted tensors") from error


def _room(scratch: mmap.mmap | None, shape: tuple[int, ...], dtype: DType, offset_bytes: int) -> torch.Tensor:
    n_items = prod(shape)
    if scratch is None or not n_items:
        return torch.empty(shape, dtype=to_torch(dtype), device="cpu")
    return torch.frombuffer(scratch, dtype=to_torch(dtype), count=n_items, offset=offset_bytes).view(shape)


def _fill(tensor: torch.Tensor, spec: TensorSpec | FusedSpec, checkpoint: Checkpoint) -> None:
    if isinstance(spec, FusedSpec):
        assemble(tensor, spec, checkpoint.open_file)
    else:
        write_tensor(tensor, spec, checkpoint.open_file(spec.region.file))
