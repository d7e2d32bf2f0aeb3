"""Files out of the page cache, and what a disk can give."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

__all__ = ["cached_share", "drop_cached", "read_seconds"]

_MADV_POPULATE_READ = 22
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
# The same number on every architecture but Alpha.
_SYS_CACHESTAT = 451
_LOWEST_BITS = bytes(number & 1 for number in range(256))


def drop_cached(files: Sequence[Path]) -> None:
    """Drop the files' cached pages; OSError if the kernel kept more than a hundredth (someone has them mapped)."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only clean pages can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if (share := cached_share(file)) > 0.01:
            raise OSError(f"{share:.0%} of {file.name} stayed in the page cache")


def cached_share(file: Path) -> float:
    """The share of a file's pages that the page cache has; 1 of an empty file.

    cachestat(2) tells, and mincore(2) where there is no such call (before Linux 6.5) or where it finds nothing: it does
    not see the files below overlayfs.
    """
    n_pages = -(-file.stat().st_size // mmap.PAGESIZE)
    if not n_pages:
        return 1.0
    with file.open("rb") as opened:
        everything, counts = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
        if not _libc.syscall(_SYS_CACHESTAT, opened.fileno(), everything, counts, 0) and counts[0]:
            return min(1.0, counts[0] / n_pages)
    with _Mapped(file) as (address, n_bytes):
        pages = ctypes.create_string_buffer(n_pages)
        if _libc.mincore(address, n_bytes, pages):
            raise OSError(ctypes.get_errno(), "mincore")
        return pages.raw.translate(_LOWEST_BITS).count(1) / n_pages


def read_seconds(file: Path) -> dict[str, float]:
    """Seconds to have a cold file in memory, by way of reading: threads with pread, with populate, O_DIRECT."""
    ways: dict[str, Callable[[], None]] = {
        "pread_x8_s": lambda: _pread(file, 8, 4 << 20, 0),
        "populate_x4_s": lambda: _populate(file, 4, 64 << 20),
        "direct_x8_s": lambda: _pread(file, 8, 4 << 20, os.O_DIRECT),
    }
    found = {}
    for name, read in ways.items():
        drop_cached([file])
        begun = perf_counter()
        try:
            read()
        except OSError:  # this file system has no O_DIRECT, or this kernel no populate
            continue
        found[name] = perf_counter() - begun
    return found


def _pread(file: Path, n_threads: int, block_bytes: int, flags: int) -> None:
    """Read the file into one buffer a thread; a mapping is aligned as O_DIRECT wants it."""
    n_bytes = file.stat().st_size

    def read(thread: int) -> None:
        with mmap.mmap(-1, block_bytes) as buffer:
            descriptor = os.open(file, os.O_RDONLY | flags)
            try:
                for begin in range(thread * block_bytes, n_bytes, n_threads * block_bytes):
                    os.preadv(descriptor, [buffer], begin)
            finally:
                os.close(descriptor)

    with ThreadPoolExecutor(n_threads) as threads:
        list(threads.map(read, range(n_threads)))


def _populate(file: Path, n_threads: int, block_bytes: int) -> None:
    with _Mapped(file) as (address, n_bytes):

        def fault_in(begin: int) -> None:
            if _libc.madvise(address + begin, min(block_bytes, n_bytes - begin), _MADV_POPULATE_READ):
                raise OSError(ctypes.get_errno(), "madvise")

        with ThreadPoolExecutor(n_threads) as threads:
            list(threads.map(fault_in, range(0, n_bytes, block_bytes)))


class _Mapped:
    """A file, mapped while the block runs: (address, bytes)."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            self._memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)

    def __enter__(self) -> tuple[int, int]:
        self._view = ctypes.c_char.from_buffer(self._memory)
        return ctypes.addressof(self._view), len(self._memory)

    def __exit__(self, *_: object) -> None:
        del self._view
        self._memory.close()
