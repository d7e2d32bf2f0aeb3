"""Bringing parts of files into the page cache in the background, in the order in which they will be used.

Readahead is advice. It owns no result, and whoever needs the bytes reads them through their own mapping or file: if
nothing was read ahead that is slow, and never wrong. So nothing here raises: what cannot be read is left out, and the
load itself will say why. No torch here: reading ahead begins before it is imported.

Two ways, by what was measured on cold files (bench/README.md): on a local disk pages are populated through a mapping
(MADV_POPULATE_READ, Linux 5.14), which copies nothing; elsewhere, and over a network, large parallel reads go into a
small buffer that is used again and again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from fastload.storage.memory import available_bytes
from fastload.storage.residency import FileSystem, file_system, resident_bytes

__all__ = ["Extent", "Readahead", "Way", "choose_way", "within_memory"]

_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
_MAP_FAILED = ctypes.c_void_p(-1).value
# After how many bytes a thread looks whether it shall stop.
_STEP_BYTES = 16 << 20
# Left free: for the process itself, and so that the kernel need not reclaim while it reads.
_RESERVE_BYTES = 256 << 20


class Extent(NamedTuple):
    """A run of bytes of a file."""

    file: str
    offset_bytes: int
    n_bytes: int


class Way(NamedTuple):
    """How bytes are brought into the page cache.

    Attributes:
        name: ``"populate"`` (a mapping's pages) or ``"read"`` (into a buffer that is thrown away).
        n_threads: threads at once.
        chunk_bytes: what a thread takes at a time; a multiple of the page size.
    """

    name: str
    n_threads: int
    chunk_bytes: int

    def __str__(self) -> str:
        return f"{self.n_threads} {self.name} threads"


POPULATE = Way("populate", 4, 64 << 20)
READ = Way("read", 8, 4 << 20)


def choose_way(kind: FileSystem) -> Way:
    """The faster way on a kind of file system.

    Over a network a page fault asks for little at a time and waits for it, also one of MADV_POPULATE_READ.
    """
    return READ if kind.is_network or not _can_populate() else POPULATE


def within_memory(extents: Iterable[Extent], most_bytes: int | None = None) -> tuple[Extent, ...]:
    """The first of these extents that fit into free memory; to read more would push out what was read before.

    Args:
        extents: what would be read, in order.
        most_bytes: the limit; None for what is available (see `available_bytes`) less a reserve.
    """
    if most_bytes is None:
        available = available_bytes()
        most_bytes = sys.maxsize if available is None else max(0, available - _RESERVE_BYTES)
    kept = []
    for extent in extents:
        n_bytes = min(extent.n_bytes, most_bytes)
        if n_bytes <= 0:
            break
        kept.append(extent._replace(n_bytes=n_bytes))
        most_bytes -= n_bytes
    return tuple(kept)


class Readahead:
    """Reads extents ahead on threads of its own, from the moment it is made.

    The threads are daemons and end with the work, with `stop`, when this object is collected, or with the process,
    whichever comes first.

    Args:
        extents: what to read, in order. What lies in the page cache already is not read again.
        way: how; None for what suits the file system of the first.
    """

    def __init__(self, extents: Sequence[Extent], way: Way | None = None) -> None:
        self.way = way or choose_way(file_system(extents[0].file) if extents else FileSystem("unknown", False))
        self._work = _Work(extents, self.way)
        self._finalizer = weakref.finalize(self, _Work.stop, self._work)
        for index in range(self._work.n_threads):
            thread = threading.Thread(target=self._work.run, name=f"fastload-readahead-{index}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads can be had: those that there are do it
                self._work.leave()

    @property
    def n_brought_bytes(self) -> int:
        """Bytes so far of the chunks that were not wholly cached when their turn came."""
        return self._work.n_brought_bytes

    @property
    def is_done(self) -> bool:
        """Nothing is being read any more: all is done, or was stopped, or this is a child forked in between."""
        return self._work.is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False if it has not come within the timeout. An interrupt (Ctrl-C) gets through."""
        return self._work.wait(timeout_s)

    def stop(self) -> None:
        """Begin nothing more. Returns at once; what is being read (at most 16 MB a thread) is read to its end."""
        self._work.stop()


class _Work:
    """What the threads share. They hold this and not the `Readahead`, so that it can be collected."""

    def __init__(self, extents: Sequence[Extent], way: Way) -> None:
        self.n_threads = min(way.n_threads, sum(-(-extent.n_bytes // way.chunk_bytes) for extent in extents))
        self.n_brought_bytes = 0
        self._way = way
        self._lock = threading.Lock()
        self._chunks = (chunk for extent in extents for chunk in _chunks(extent, way.chunk_bytes))
        self._stopped = False
        self._pid = os.getpid()
        self._descriptors: dict[str, int] = {}
        self._n_running = self.n_threads
        self._done = threading.Event()
        if not self.n_threads:
            self._done.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set() or os.getpid() != self._pid

    def wait(self, timeout_s: float | None) -> bool:
        return os.getpid() != self._pid or self._done.wait(timeout_s)

    def stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        try:
            buffer = None if self._way.name == "populate" else memoryview(bytearray(self._way.chunk_bytes))
            while (chunk := self._take()) is not None:
                try:
                    self._bring(chunk, buffer)
                except OSError:  # noqa: PERF203  the load meets it too, and has words for it
                    continue
        except MemoryError:
            self.stop()
        finally:
            self.leave()

    def _take(self) -> Extent | None:
        with self._lock:
            return None if self._stopped else next(self._chunks, None)

    def _bring(self, chunk: Extent, buffer: memoryview | None) -> None:
        descriptor = self._open(chunk.file)
        if (resident_bytes(descriptor, chunk.offset_bytes, chunk.n_bytes) or 0) >= chunk.n_bytes:
            return
        if buffer is None:
            self._populate(descriptor, chunk)
        else:
            self._read(descriptor, chunk, buffer)
        with self._lock:
            self.n_brought_bytes += chunk.n_bytes

    def _populate(self, descriptor: int, chunk: Extent) -> None:
        # Beyond the end of the file there are no pages: it may have become shorter.
        n_bytes = min(chunk.n_bytes, os.fstat(descriptor).st_size - chunk.offset_bytes)
        if n_bytes <= 0:
            return
        libc = _libc()
        base = libc.mmap(None, n_bytes, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, chunk.offset_bytes)
        if base in (None, _MAP_FAILED):
            raise OSError(ctypes.get_errno(), "mmap")
        try:
            # Has the page cache filled in units of 2 MB where the file system can: a fifth of the processor time, and
            # later faults are cheaper too. Where it cannot, this is refused, and does not matter.
            libc.madvise(base, n_bytes, _MADV_HUGEPAGE)
            for at in range(0, n_bytes, _STEP_BYTES):
                if self._stopped:
                    return
                # ctypes lets go of the interpreter's lock; mmap.madvise does not.
                if libc.madvise(base + at, min(_STEP_BYTES, n_bytes - at), _MADV_POPULATE_READ) != 0:
                    raise OSError(ctypes.get_errno(), "madvise")
        finally:
            libc.munmap(base, n_bytes)

    def _read(self, descriptor: int, chunk: Extent, buffer: memoryview) -> None:
        done = 0
        while done < chunk.n_bytes and not self._stopped:
            n = os.preadv(descriptor, [buffer[: chunk.n_bytes - done]], chunk.offset_bytes + done)
            if n == 0:
                return
            done += n

    def _open(self, file: str) -> int:
        with self._lock:
            descriptor = self._descriptors.get(file)
            if descriptor is None:
                descriptor = self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return descriptor

    def leave(self) -> None:
        """The last thread closes the files."""
        with self._lock:
            self._n_running -= 1
            if self._n_running:
                return
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
        self._done.set()


def _chunks(extent: Extent, chunk_bytes: int) -> Iterable[Extent]:
    """An extent in parts that begin at multiples of chunk_bytes in the file, but for the first, at its page."""
    at = extent.offset_bytes // mmap.PAGESIZE * mmap.PAGESIZE
    end = extent.offset_bytes + extent.n_bytes
    while at < end:
        next_at = min(end, (at // chunk_bytes + 1) * chunk_bytes)
        yield Extent(extent.file, at, next_at - at)
        at = next_at


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_int64]
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, number]
    return libc


@cache
def _can_populate() -> bool:
    """Whether the kernel has MADV_POPULATE_READ: it says EINVAL to an advice that it does not know."""
    if sys.platform != "linux":
        return False
    libc = _libc()
    protection, flags = mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = libc.mmap(None, mmap.PAGESIZE, protection, flags, -1, 0)
    if base in (None, _MAP_FAILED):
        return False
    try:
        return bool(libc.madvise(base, mmap.PAGESIZE, _MADV_POPULATE_READ) == 0)
    finally:
        libc.munmap(base, mmap.PAGESIZE)
