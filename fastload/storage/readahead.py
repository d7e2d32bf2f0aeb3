"""Bringing parts of files into the page cache in the background, in the order in which they will be used.

Readahead is advice. It owns no result, and whoever needs the bytes reads them through their own mapping or file: if
nothing was read ahead that is slow, and never wrong. So nothing here raises: what cannot be read is left out, and the
load itself will say why. No torch here: reading ahead begins before it is imported.

Threads read, each with a descriptor of its own (readers of one descriptor spoil each other's sequential pattern: 0.5
instead of 1.7 GB/s), into a small buffer that is used again and again. To populate a mapping (MADV_POPULATE_READ) is no
faster on the disk, saves the copy (0.2 s of processor time for 2.2 GB), and leaves something dear undone: on a virtual
machine whose host takes free memory back, whoever touches a page first waits for the host. That took the first pass
over 2.2 GB from 0.24 to 2.0 s, and to 6 s in 2 MB folios; a reader's copy has touched every page in the background.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from fastload.storage.memory import available_bytes
from fastload.storage.residency import FileSystem, file_system, resident_bytes

__all__ = ["Extent", "Readahead", "Way", "choose_way", "within_memory"]

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
        n_threads: threads at once.
        chunk_bytes: what a thread takes at a time, and reads from its beginning to its end.
        read_bytes: the size of a read, and of a thread's buffer.
    """

    n_threads: int
    chunk_bytes: int
    read_bytes: int

    def __str__(self) -> str:
        threads = "1 thread" if self.n_threads == 1 else f"{self.n_threads} threads"
        return f"{threads} in reads of {self.read_bytes >> 20} MB"


# On a disk small reads do, since the kernel reads ahead of them, and the buffer stays in the processor's cache. A
# server is asked for as much at a time as it may give.
LOCAL = Way(8, 32 << 20, 1 << 20)
NETWORK = Way(8, 32 << 20, 4 << 20)


def choose_way(kind: FileSystem) -> Way:
    """How to read on a kind of file system."""
    return NETWORK if kind.is_network else LOCAL


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
        nothing_behind: the kernel shall not read on behind an extent, as it does for who reads in order.
    """

    def __init__(self, extents: Sequence[Extent], way: Way | None = None, *, nothing_behind: bool = False) -> None:
        self.way = way or choose_way(file_system(extents[0].file) if extents else FileSystem("unknown", False))
        self._work = _Work(extents, self.way, nothing_behind)
        self._finalizer = weakref.finalize(self, _Work.stop, self._work)
        for index in range(self._work.n_threads):
            thread = threading.Thread(target=self._work.run, name=f"fastload-readahead-{index}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads can be had: those that there are do it
                self._work.leave()

    @property
    def n_brought_bytes(self) -> int:
        """Bytes so far of the reads that were not wholly cached when their turn came."""
        return self._work.n_brought_bytes

    @property
    def is_done(self) -> bool:
        """Nothing is being read any more: all is done, or was stopped, or this is a child forked in between."""
        return self._work.is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False if it has not come within the timeout. An interrupt (Ctrl-C) gets through."""
        return self._work.wait(timeout_s)

    def stop(self) -> None:
        """Begin nothing more. Returns at once; reads that are under way (one a thread) go on to their end."""
        self._work.stop()


class _Work:
    """What the threads share. They hold this and not the `Readahead`, so that it can be collected."""

    def __init__(self, extents: Sequence[Extent], way: Way, nothing_behind: bool) -> None:
        self.n_threads = min(way.n_threads, sum(-(-extent.n_bytes // way.chunk_bytes) for extent in extents))
        self.n_brought_bytes = 0
        self._way = way
        self._nothing_behind = nothing_behind
        self._lock = threading.Lock()
        self._chunks = (chunk for extent in extents for chunk in _chunks(extent, way.chunk_bytes))
        self._stopped = False
        self._descriptors: dict[str, int] = {}
        self._pid = os.getpid()
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
            buffer = memoryview(bytearray(self._way.read_bytes))
            while (chunk := self._take()) is not None:
                # A file that cannot be read is met by the load too, which has words for it.
                with suppress(OSError):
                    self._bring(self._open(chunk.file), chunk, buffer)
        except MemoryError:
            self.stop()
        finally:
            self.leave()

    def _open(self, file: str) -> int:
        """A file, opened once for all threads."""
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                if self._nothing_behind and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._descriptors[file], 0, 0, os.POSIX_FADV_RANDOM)
            return self._descriptors[file]

    def _take(self) -> Extent | None:
        with self._lock:
            return None if self._stopped else next(self._chunks, None)

    def _bring(self, descriptor: int, chunk: Extent, buffer: memoryview) -> None:
        """Read what is missing of a chunk, and not what lies around a few pages that the kernel took back."""
        if _is_resident(descriptor, chunk.offset_bytes, chunk.n_bytes):
            return
        done = n_brought = 0
        while done < chunk.n_bytes and not self._stopped:
            at, n = chunk.offset_bytes + done, min(len(buffer), chunk.n_bytes - done)
            if not _is_resident(descriptor, at, n):
                n = os.preadv(descriptor, [buffer[:n]], at)
                if n == 0:
                    break
                n_brought += n
            done += n
        with self._lock:
            self.n_brought_bytes += n_brought

    def leave(self) -> None:
        """One thread less; the last one is the end, and closes the files."""
        with self._lock:
            self._n_running -= 1
            if self._n_running:
                return
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        self._done.set()


def _is_resident(descriptor: int, offset_bytes: int, n_bytes: int) -> bool:
    return (resident_bytes(descriptor, offset_bytes, n_bytes) or 0) >= n_bytes


def _chunks(extent: Extent, chunk_bytes: int) -> Iterable[Extent]:
    """An extent in parts that begin at multiples of chunk_bytes in the file, but for the first, at its page."""
    at = extent.offset_bytes // mmap.PAGESIZE * mmap.PAGESIZE
    end = extent.offset_bytes + extent.n_bytes
    while at < end:
        next_at = min(end, (at // chunk_bytes + 1) * chunk_bytes)
        yield Extent(extent.file, at, next_at - at)
        at = next_at
