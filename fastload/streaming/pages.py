"""Letting go of the pages of mapped tensors, so that what comes next has room."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import torch

from fastload.formats.specs import TensorSpec
from fastload.plan.fusing import FusedSpec
from fastload.plan.rows import FusedRow, PlanRow
from fastload.storage.readahead import Extent

__all__ = ["MappedPart", "let_go", "parts_of"]

_PAGE = mmap.PAGESIZE
_MADV_DONTNEED = 4


class MappedPart(NamedTuple):
    """Bytes of a tensor that are pages of a file.

    Attributes:
        extent: where they are in the file.
        address: where they are in memory.
    """

    extent: Extent
    address: int


def parts_of(row: PlanRow | FusedRow, tensor: torch.Tensor) -> list[MappedPart]:
    """The parts of a mapped row's tensor: one, or one for each piece of a fused tensor, in its order."""
    spec: TensorSpec | FusedSpec = row.spec
    base = tensor.data_ptr()
    if isinstance(spec, FusedSpec):
        itemsize = row.dtype.itemsize
        return [
            MappedPart(Extent(*piece.spec.region[:3]), base + piece.offset * itemsize)
            for piece in sorted(spec.pieces, key=lambda piece: piece.offset)
        ]
    start = base - (spec.view.offset * row.dtype.itemsize if spec.view is not None else 0)
    return [MappedPart(Extent(*spec.region[:3]), start)]


def let_go(parts: Iterable[MappedPart]) -> None:
    """Take whole pages of parts out of this process and out of the page cache.

    Only of parts that nothing was written to: it would be lost. A page that two parts share stays.
    """
    descriptors: dict[str, int] = {}
    try:
        for (file, offset, n_bytes), address in parts:
            begin = -(-address // _PAGE) * _PAGE
            end = (address + n_bytes) // _PAGE * _PAGE
            if end > begin:
                _libc().madvise(begin, end - begin, _MADV_DONTNEED)
                # Advice: pages that others have mapped stay, and a file that is gone has none.
                with suppress(OSError):
                    if file not in descriptors:
                        descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                    os.posix_fadvise(descriptors[file], offset + begin - address, end - begin, os.POSIX_FADV_DONTNEED)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
