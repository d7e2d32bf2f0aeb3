"""Checksums of much memory at once, by several threads."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from fastload.errors import TruncatedFileError, UnreadableFileError
from fastload.formats.checksums import BLOCK_BYTES, checksum

__all__ = ["block_checksums", "file_checksums"]

# Two threads read memory as fast as most small machines have it; more are of use where there are many channels.
_MAX_THREADS = 4
# Below this, to hand a block to another thread takes as long as to hash it.
_LARGE_BYTES = 1 << 20
_MADV_POPULATE_READ = 22


def _n_threads() -> int:
    """How many threads to hash with."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MAX_THREADS, n_cpus)


def block_checksums(buffers: Sequence[memoryview]) -> list[str]:
    """Checksums of the blocks of each buffer, in order."""
    blocks = [
        buffer[begin : begin + BLOCK_BYTES] for buffer in buffers for begin in range(0, buffer.nbytes, BLOCK_BYTES)
    ]
    large = [block for block in blocks if block.nbytes >= _LARGE_BYTES]
    if len(large) < 2 or _n_threads() == 1:
        return [checksum(block) for block in blocks]
    with ThreadPoolExecutor(_n_threads(), "fastload-hash") as threads:
        of_large = threads.map(checksum, large)
        return [next(of_large) if block.nbytes >= _LARGE_BYTES else checksum(block) for block in blocks]


def file_checksums(path: str, blocks: Sequence[tuple[int, int]], progress: Callable[[int], None]) -> list[str]:
    """Checksums of parts of a file, read by several threads.

    The parts are hashed where they lie in the page cache, through a mapping: a copy would take as long as the hash.
    Before a part is touched the kernel is asked to have it there (MADV_POPULATE_READ), which answers with an error
    where the disk has one or the file was cut; touched without that, such a page ends the process.

    Args:
        path: the file.
        blocks: (offset, number) of the bytes of each part, ascending.
        progress: called with the number of bytes whenever some were read.

    Raises:
        UnreadableFileError: the operating system refused.
        TruncatedFileError: the file ends before a part does.
    """
    if not blocks:
        return []
    with _Readable(path, blocks[-1][0] + blocks[-1][1]) as file, ThreadPoolExecutor(_n_threads()) as threads:

        def hash_together(group: list[tuple[int, int]]) -> list[str]:
            begin, end = group[0][0], sum(group[-1])
            data = file.bytes_of(begin, end)
            return [checksum(data[offset - begin : offset - begin + n_bytes]) for offset, n_bytes in group]

        groups = _grouped(blocks)
        found: list[str] = []
        try:
            for group, checksums in zip(groups, threads.map(hash_together, groups), strict=True):
                found += checksums
                progress(sum(n_bytes for _, n_bytes in group))
            return found
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _grouped(blocks: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Neighbours together, as far as they are no more than a block: there may be 100,000 of a few bytes."""
    groups: list[list[tuple[int, int]]] = []
    for offset, n_bytes in blocks:
        if groups and offset + n_bytes - groups[-1][0][0] <= BLOCK_BYTES:
            groups[-1].append((offset, n_bytes))
        else:
            groups.append([(offset, n_bytes)])
    return groups


class _Readable:
    """The beginning of a file, mapped to be read."""

    def __init__(self, path: str, n_bytes: int) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(self._descriptor).st_size
                if size < n_bytes:
                    raise self._cut(n_bytes, size)
                self._mapping = mmap.mmap(self._descriptor, n_bytes, access=mmap.ACCESS_READ)
            except BaseException:
                os.close(self._descriptor)
                raise
        except OSError as error:
            raise UnreadableFileError("a weight file cannot be mapped", file=path, found=error.strerror) from error
        self._bytes = np.frombuffer(self._mapping, np.uint8)

    def __enter__(self) -> _Readable:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def bytes_of(self, begin: int, end: int) -> memoryview:
        """Some of the bytes, brought into memory. Raises UnreadableFileError, TruncatedFileError."""
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        if _libc().madvise(self._bytes.ctypes.data + first, end - first, _MADV_POPULATE_READ) == 0:
            return self._bytes[begin:end].data
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            size = os.fstat(self._descriptor).st_size
            raise self._cut(end, size) if size < end else self._unreadable(begin, end, os.strerror(errno.EIO))
        return self._read(begin, end)  # a kernel before 5.14

    def _read(self, begin: int, end: int) -> memoryview:
        buffer = memoryview(bytearray(end - begin))
        done = 0
        while done < len(buffer):
            try:
                n = os.preadv(self._descriptor, [buffer[done:]], begin + done)
            except OSError as error:
                raise self._unreadable(begin, end, error.strerror) from error
            if n == 0:
                raise self._cut(end, begin + done)
            done += n
        return buffer

    def _unreadable(self, begin: int, end: int, reason: str | None) -> UnreadableFileError:
        return UnreadableFileError(
            "a file could not be read to its end",
            file=self._path,
            found=f"{reason}, in bytes {begin:,} to {end:,}",
            fix="fetch the file again, and look at the health of the disk",
        )

    def _cut(self, expected: int, found: int) -> TruncatedFileError:
        return TruncatedFileError(
            "a file was cut while it was read",
            file=self._path,
            expected=f"{expected:,} bytes",
            found=f"{found:,}",
            fix="wait until whoever writes it is done, then verify again",
        )


@cache
def _libc() -> ctypes.CDLL:
    # Through ctypes, which lets other threads run meanwhile; the method of a mmap does not.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
