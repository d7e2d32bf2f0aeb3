"""Letting go of the pages of mapped tensors, so that what comes next has room."""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import NamedTuple

import torch

from fastload.formats.specs import TensorSpec
from fastload.plan.fusing import FusedSpec
from fastload.plan.rows import FusedRow, PlanRow
from fastload.storage.readahead import Extent
from fastload.streaming.reading import Descriptors, joined, read_plainly

__all__ = ["FileMappings", "MappedPart", "extents_of", "fill", "let_go", "parts_of", "stop_reading_around"]

_PAGE = mmap.PAGESIZE
_MADV_RANDOM = 1
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22
# The highest bits of a page's entry in pagemap: in memory, swapped, and whether it is a page of a file (or of shared
# memory). For the last byte of an entry, 1 if the page is in use and of no file: it was written to.
_ENTRY_BYTES = 8
_IS_WRITTEN = bytes(int(byte >> 6 != 0 and not byte >> 5 & 1) for byte in range(256))


class MappedPart(NamedTuple):
    """Bytes of a tensor that are pages of a file.

    Attributes:
        extent: where they are in the file.
        address: where they are in memory.
    """

    extent: Extent
    address: int


class FileMappings:
    """Where this process has files mapped, at the moment when this is made."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        with open("/proc/self/maps") as maps:
            for line in maps:
                addresses, _, _, _, inode = line.split(None, 5)[:5]
                if inode != "0":
                    begin, _, end = addresses.partition("-")
                    self._begins.append(int(begin, 16))
                    self._ends.append(int(end, 16))

    def __contains__(self, address: int) -> bool:
        at = bisect_right(self._begins, address) - 1
        return at >= 0 and address < self._ends[at]


def parts_of(row: PlanRow | FusedRow, tensor: torch.Tensor, mappings: FileMappings) -> list[MappedPart]:
    """The parts of a mapped row's tensor: one, or one for each piece of a fused tensor, in its order.

    Pieces that had to be copied are not among them (see `fastload.storage.remapping`): they do not lie in a page as
    they do in the file, or there were no mappings left for them.
    """
    spec: TensorSpec | FusedSpec = row.spec
    base = tensor.data_ptr()
    if isinstance(spec, FusedSpec):
        itemsize = row.dtype.itemsize
        parts = [
            MappedPart(Extent(*piece.spec.region[:3]), base + piece.offset * itemsize)
            for piece in sorted(spec.pieces, key=lambda piece: piece.offset)
        ]
        return [part for part in parts if _up(part.address) in mappings]
    start = base - (spec.view.offset * row.dtype.itemsize if spec.view is not None else 0)
    return [MappedPart(Extent(*spec.region[:3]), start)]


def extents_of(row: PlanRow | FusedRow) -> list[Extent]:
    """What of the files a row is made of; pieces that follow each other there as one."""
    if isinstance(row, PlanRow):
        region = row.spec.region
        n_bytes = region.n_bytes if region.encoding is None else region.encoding.n_bytes
        return [Extent(region.file, region.offset_bytes, n_bytes)]
    return joined(Extent(*piece.spec.region[:3]) for piece in row.spec.pieces)


def stop_reading_around(tensor: torch.Tensor) -> None:
    """Have a missing page of a fused tensor read alone, and not with megabytes around it."""
    begin, end = tensor.data_ptr() // _PAGE * _PAGE, _up(tensor.data_ptr() + tensor.nbytes)
    _libc().madvise(begin, end - begin, _MADV_RANDOM)


def fill(parts: Iterable[MappedPart], files: Descriptors) -> None:
    """Have the pages of parts in memory and mapped, which waits for what is being read.

    Raises:
        UnreadableFileError: a page cannot be read.
    """
    for part in parts:
        begin = part.address // _PAGE * _PAGE
        n_bytes = _up(part.address + part.extent.n_bytes) - begin
        if _libc().madvise(begin, n_bytes, _MADV_POPULATE_READ) != 0:
            # The kernel does not know this (before 5.14), or the page cannot be read, and reading tells why.
            read_plainly(part.extent, files)


def let_go(parts: Iterable[MappedPart], files: Descriptors) -> None:
    """Take whole pages of parts out of this process and out of the page cache.

    Pages that were written to, in whichever way, stay, as does a page that two parts share. Where the kernel does not
    tell which were written to, it is for the caller to leave out such parts.
    """
    with _pagemap() as pagemap:
        for (file, offset, n_bytes), address in parts:
            for begin, end in _unwritten(_up(address), (address + n_bytes) // _PAGE * _PAGE, pagemap):
                _libc().madvise(begin, end - begin, _MADV_DONTNEED)
                # Advice: pages that others have mapped stay, and a file that is gone has none.
                with suppress(OSError):
                    os.posix_fadvise(files.of(file), offset + begin - address, end - begin, os.POSIX_FADV_DONTNEED)


@contextmanager
def _pagemap() -> Iterator[int | None]:
    """The descriptor of what the kernel tells about this process's pages; None where it tells nothing."""
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _unwritten(begin: int, end: int, pagemap: int | None) -> Iterator[tuple[int, int]]:
    """The runs of whole pages in a range that are not this process's alone, as one is that was written to."""
    if end <= begin:
        return
    entries = b""
    if pagemap is not None:
        entries = os.pread(pagemap, (end - begin) // _PAGE * _ENTRY_BYTES, begin // _PAGE * _ENTRY_BYTES)
    is_written = entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_IS_WRITTEN)
    first, page = begin, is_written.find(1)
    while page >= 0:
        address = first + page * _PAGE
        if address > begin:
            yield begin, address
        begin = address + _PAGE
        page = is_written.find(1, page + 1)
    if end > begin:
        yield begin, end


def _up(address: int) -> int:
    """The first page that begins at an address or behind it."""
    return -(-address // _PAGE) * _PAGE


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
