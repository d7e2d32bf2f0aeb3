"""Pieces of files laid side by side in virtual memory: one tensor out of many, without copying them.

A fused tensor (all experts of a layer, say) is kept as many small tensors in the files. Where the bytes of a piece
have the same place within a page in the file as in the fused tensor, the file's pages themselves are mapped at that
place (`mmap` with MAP_FIXED); only the pages that a piece shares with its neighbours are copied. Pieces that do not
agree are read into place. A page that two pieces share is mapped with the first, and the second's part written into
it. Either way there is never a second copy, and what was mapped stays shared page cache until
it is written to.

Linux keeps at most vm.max_map_count mappings a process (65,530 by default), so the number made here is budgeted.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

from fastload.errors import TruncatedFileError, UnreadableFileError

__all__ = ["FilePiece", "Layout", "lay_out", "mappings_left"]

_PAGE = mmap.PAGESIZE
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
# Of the kernel's limit, what is left to everything else in the process.
_RESERVED_MAPPINGS = 16384
_READ_BYTES = 8 << 20
_N_READERS = 4


class FilePiece(NamedTuple):
    """Bytes of a file and where they go. All units are bytes.

    Attributes:
        file: path.
        file_offset: where they begin in the file.
        offset: where they begin in the fused tensor.
        n_bytes: their number.
    """

    file: str
    file_offset: int
    offset: int
    n_bytes: int


class _Part(NamedTuple):
    """Whole pages of a file that are mapped for a run; first and end are counted from the page the range begins in."""

    run: FilePiece
    first: int
    end: int


class Layout(NamedTuple):
    """A range of memory that holds the pieces.

    Attributes:
        buffer: the range. It is unmapped when nothing refers to this object any more; tensors made of it do.
        n_mapped_bytes: bytes that are pages of the files.
        n_copied_bytes: bytes that were read into memory of the process's own.
    """

    buffer: ctypes.Array[ctypes.c_char]
    n_mapped_bytes: int
    n_copied_bytes: int


def mappings_left() -> int:
    """Mappings that fused tensors of this process may still use."""
    return max(0, _BUDGET.limit() - _BUDGET.used)


def lay_out(pieces: Iterable[FilePiece], n_bytes: int, itemsize: int) -> Layout:
    """Bring pieces side by side into one range of n_bytes; every byte of it belongs to exactly one piece.

    Args:
        pieces: where each byte comes from.
        n_bytes: size of the range, more than 0.
        itemsize: bytes that the range's first address shall be a multiple of.

    Raises:
        UnreadableFileError: a file cannot be opened, mapped or read.
        TruncatedFileError: a file ends before its piece does.
    """
    runs = _runs(pieces)
    shift = _best_shift(runs, itemsize)
    parts = _mapped_parts(runs, shift)
    n_mappings = _n_mappings(parts, shift + n_bytes)
    if not _BUDGET.take(n_mappings):
        parts, n_mappings = [], 0
    try:
        buffer = _reserve(n_bytes, shift, n_mappings)
    except BaseException:
        _BUDGET.give_back(n_mappings)
        raise
    descriptors = {file: _open(file) for file in {run.file for run in runs}}
    try:
        _check_sizes(runs, descriptors)
        _map_parts(parts, ctypes.addressof(buffer) - shift, shift, descriptors)
        reads = _not_mapped(runs, parts, shift)
        _read_runs(reads, memoryview(buffer).cast("B"), descriptors)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    n_copied = sum(run.n_bytes for run in reads) + _n_shared_bytes(parts, reads, shift)
    return Layout(buffer, n_bytes - n_copied, n_copied)


class _Budget:
    """How many mappings are in use, by all fused tensors of the process together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.used = 0

    def limit(self) -> int:
        try:
            with open("/proc/sys/vm/max_map_count") as file:
                return int(file.read()) - _RESERVED_MAPPINGS
        except OSError:
            return 65530 - _RESERVED_MAPPINGS

    def take(self, n: int) -> bool:
        with self._lock:
            if self.used + n > self.limit():
                return False
            self.used += n
            return True

    def give_back(self, n: int) -> None:
        with self._lock:
            self.used -= n


_BUDGET = _Budget()


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.munmap.restype = ctypes.c_int
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _runs(pieces: Iterable[FilePiece]) -> list[FilePiece]:
    """Pieces by destination; those that follow each other in the file and in the destination are joined."""
    runs: list[FilePiece] = []
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        if not piece.n_bytes:
            continue
        if runs:
            file, file_offset, offset, n_bytes = runs[-1]
            if (file, file_offset + n_bytes, offset + n_bytes) == piece[:3]:
                runs[-1] = FilePiece(file, file_offset, offset, n_bytes + piece.n_bytes)
                continue
        runs.append(piece)
    return runs


def _best_shift(runs: list[FilePiece], itemsize: int) -> int:
    """Where in a page the range should begin, so that the most bytes lie in their pages as they do in the files."""
    bytes_by_shift: Counter[int] = Counter()
    for run in runs:
        shift = (run.file_offset - run.offset) % _PAGE
        if shift % itemsize == 0:
            bytes_by_shift[shift] += run.n_bytes
    return bytes_by_shift.most_common(1)[0][0] if bytes_by_shift else 0


def _mapped_parts(runs: list[FilePiece], shift: int) -> list[_Part]:
    """The pages of runs that can be mapped, by destination; a page that two share belongs to the first."""
    parts: list[_Part] = []
    taken = 0
    for run in runs:
        begin, end = shift + run.offset, shift + run.offset + run.n_bytes
        if (run.file_offset - begin) % _PAGE == 0 and -(-begin // _PAGE) < end // _PAGE:
            first, taken = max(begin // _PAGE * _PAGE, taken), -(-end // _PAGE) * _PAGE
            parts.append(_Part(run, first, taken))
    return parts


def _n_mappings(parts: list[_Part], length: int) -> int:
    """One for each part, and for each stretch of the range between them."""
    edges = [0, *(edge for _, first, end in parts for edge in (first, end)), -(-length // _PAGE) * _PAGE]
    return len(parts) + sum(begin < end for begin, end in zip(edges[::2], edges[1::2], strict=True))


def _not_mapped(runs: list[FilePiece], parts: list[_Part], shift: int) -> list[FilePiece]:
    """What must be read: runs without a part, and beginnings of runs that lie in another part's page."""
    first_of = {run: first - shift for run, first, _ in parts}
    reads = []
    for run in runs:
        n_bytes = min(first_of.get(run, run.offset + run.n_bytes) - run.offset, run.n_bytes)
        if n_bytes > 0:
            reads.append(run._replace(n_bytes=n_bytes))
    return reads


def _n_shared_bytes(parts: list[_Part], reads: list[FilePiece], shift: int) -> int:
    """Bytes of parts in pages that something is read into; the kernel has copied these."""
    written = {edge // _PAGE for run in reads for edge in (shift + run.offset, shift + run.offset + run.n_bytes - 1)}
    n_shared = 0
    for run, first, end in parts:
        begin = max(shift + run.offset, first)
        finish = shift + run.offset + run.n_bytes
        if begin // _PAGE in written:
            n_shared += min(begin // _PAGE * _PAGE + _PAGE, finish) - begin
        if end // _PAGE - 1 in written and finish // _PAGE * _PAGE > begin:
            n_shared += finish % _PAGE
    return n_shared


def _reserve(n_bytes: int, shift: int, n_mappings: int) -> ctypes.Array[ctypes.c_char]:
    """Fresh memory that begins `shift` bytes into a page; unmapped, and the budget given back, with its last user."""
    length = shift + n_bytes
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    base = _libc().mmap(None, length, protection, flags, -1, 0)
    if base in (None, _MAP_FAILED):
        raise MemoryError(f"{length} bytes of address space: {os.strerror(ctypes.get_errno())}")
    buffer = (ctypes.c_char * n_bytes).from_address(base + shift)
    # At exit the kernel takes everything back; unmapping then could pull memory from under a thread.
    weakref.finalize(buffer, _release, base, length, n_mappings).atexit = False
    return buffer


def _release(base: int, length: int, n_mappings: int) -> None:
    _libc().munmap(base, length)
    _BUDGET.give_back(n_mappings)


def _map_parts(parts: list[_Part], base: int, shift: int, descriptors: dict[str, int]) -> None:
    map_pages = _libc().mmap
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    for (file, file_offset, offset, _), first, end in parts:
        at = file_offset + first - (shift + offset)
        if map_pages(base + first, end - first, protection, flags, descriptors[file], at) != base + first:
            raise UnreadableFileError(
                "pages of a weight file cannot be mapped", file=file, found=os.strerror(ctypes.get_errno())
            )


def _read_runs(runs: list[FilePiece], destination: memoryview, descriptors: dict[str, int]) -> None:
    """Read runs into place: the large ones in chunks and in parallel, so that page faults are shared among cores."""
    small = [run for run in runs if run.n_bytes < _READ_BYTES]
    large = [
        FilePiece(run.file, run.file_offset + at, run.offset + at, min(_READ_BYTES, run.n_bytes - at))
        for run in runs
        if run.n_bytes >= _READ_BYTES
        for at in range(0, run.n_bytes, _READ_BYTES)
    ]
    n_small_bytes = sum(run.n_bytes for run in small)
    if not large and n_small_bytes < _READ_BYTES:
        for run in small:
            _read(run, destination, descriptors)
        return
    with ThreadPoolExecutor(_N_READERS, "fastload-read") as readers:
        # Joining the results raises what a reader raised.
        list(readers.map(lambda run: _read(run, destination, descriptors), [*large, *small]))


def _read(run: FilePiece, destination: memoryview, descriptors: dict[str, int]) -> None:
    file, file_offset, offset, n_bytes = run
    done = 0
    while done < n_bytes:
        try:
            n = os.preadv(descriptors[file], [destination[offset + done : offset + n_bytes]], file_offset + done)
        except OSError as error:
            raise UnreadableFileError("a weight file cannot be read", file=file, found=error.strerror) from error
        if n == 0:
            raise TruncatedFileError.since_opened(file, file_offset + n_bytes, file_offset + done)
        done += n


def _open(file: str) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UnreadableFileError("a weight file cannot be opened", file=file, found=error.strerror) from error


def _check_sizes(runs: list[FilePiece], descriptors: dict[str, int]) -> None:
    """Pages beyond the end of a file can be mapped, and kill the process when they are touched."""
    sizes = {file: os.fstat(descriptor).st_size for file, descriptor in descriptors.items()}
    for run in runs:
        if run.file_offset + run.n_bytes > sizes[run.file]:
            raise TruncatedFileError.since_opened(run.file, run.file_offset + run.n_bytes, sizes[run.file])
