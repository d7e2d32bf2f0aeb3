"""Tensors that lie in several places of the files, put together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastload.formats.specs import FusedSpec
from fastload.storage.mapping import MappedFile

__all__ = ["assemble"]


def assemble(destination: torch.Tensor, spec: FusedSpec, open_file: Callable[[str], MappedFile]) -> None:
    """Write the pieces of a tensor into a contiguous one of its shape, converted to its type.

    Args:
        destination: where to.
        spec: what of.
        open_file: path -> the mapped file.
    """
    for piece in spec.pieces:
        file = open_file(piece.spec.region.file)
        with torch.no_grad():
            box = destination.as_strided(piece.spec.shape, piece.stride, destination.storage_offset() + piece.offset)
            box.copy_(file.tensor(piece.spec))
        file.release(piece.spec.region)
