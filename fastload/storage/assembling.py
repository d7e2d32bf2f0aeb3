"""Tensors of the files written into memory that is there: whole ones, and those that lie in several places."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastload.dtypes import to_torch
from fastload.formats.specs import FusedSpec, TensorSpec
from fastload.storage.mapping import MappedFile

__all__ = ["assemble", "write_tensor"]


def assemble(destination: torch.Tensor, spec: FusedSpec, open_file: Callable[[str], MappedFile]) -> None:
    """Write the pieces of a tensor into a contiguous one of its shape, converted to its type.

    Args:
        destination: where to.
        spec: what of.
        open_file: path -> the mapped file.
    """
    for piece in spec.pieces:
        box = destination.as_strided(piece.spec.shape, piece.stride, destination.storage_offset() + piece.offset)
        write_tensor(box, piece.spec, open_file(piece.spec.region.file))


def write_tensor(destination: torch.Tensor, spec: TensorSpec, file: MappedFile) -> None:
    """Write a tensor of a file into one of its shape, converted to its type, and let go of its pages."""
    is_raw = spec.region.encoding is None and spec.view is None and destination.dtype == to_torch(spec.dtype)
    with torch.no_grad():
        if is_raw and spec.shape and destination.stride(-1) == 1:
            # Byte by byte: what has no address for its type in the file needs no copy that has one.
            in_bytes = destination.view(torch.uint8)
            in_bytes.copy_(file.raw(spec.region).view(in_bytes.shape))
        else:
            destination.copy_(file.tensor(spec))
    file.release(spec.region)
