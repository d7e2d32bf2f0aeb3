"""Reading parts of files into the page cache, and knowing that it was done.

Readahead (`fastload.storage.readahead`) is advice; this is a promise. A block that computes on mapped pages must not
find them beyond the end of a file that was cut, or behind a disk that fails: the process would be killed.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from fastload.errors import TruncatedFileError, UnreadableFileError
from fastload.storage.readahead import Extent
from fastload.storage.residency import resident_bytes

__all__ = ["Descriptors", "Reader", "Ticket", "ask_for", "joined", "read_plainly"]

_N_THREADS = 8
# What a thread reads from beginning to end; in between it looks for nothing else.
_CHUNK_BYTES = 8 << 20
_READ_BYTES = 1 << 20


class Ticket:
    """Reads that are under way.

    Attributes:
        n_bytes: of all of them.
    """

    def __init__(self, futures: Iterable[Future[int]], n_bytes: int) -> None:
        self._futures = list(futures)
        self.n_bytes = n_bytes

    def wait(self) -> int:
        """Wait for the end. Returns the bytes that were not in the page cache; raises what a read raised."""
        return sum(future.result() for future in self._futures)

    def cancel(self) -> None:
        """Begin no more of them."""
        for future in self._futures:
            future.cancel()


class Reader:
    """Threads that read; they end with this object.

    Args:
        files: what is read is read from these.
        scattered: what is read lies in small parts here and there. Then the kernel shall not read on behind them, nor
            keep them in units that are too large to be let go of one by one.
    """

    def __init__(self, files: Descriptors, *, scattered: bool = False) -> None:
        self._files = files
        self._scattered = scattered
        self._threads = ThreadPoolExecutor(_N_THREADS, "fastload-blocks")
        self._own = threading.local()
        weakref.finalize(self, self._threads.shutdown, wait=False, cancel_futures=True)

    def read(self, extents: Iterable[Extent]) -> Ticket:
        """Begin to read extents, in order."""
        chunks = [chunk for extent in extents for chunk in _chunks(extent)]
        own, files, scattered = self._own, self._files, self._scattered
        return Ticket(
            [self._threads.submit(_read, own, files, scattered, chunk) for chunk in chunks],
            sum(c.n_bytes for c in chunks),
        )


class Descriptors:
    """Files open for reading, each once; they are closed with this object.

    Args:
        files: to be opened now, so that they are read whatever their names mean later. UnreadableFileError if one
            cannot be.
        path_of: file -> the path to open it by.
    """

    def __init__(self, files: Iterable[str] = (), path_of: Callable[[str], str] = str) -> None:
        self._descriptors: dict[str, int] = {}
        self._path_of = path_of
        for file in files:
            with _named(file):
                self.of(file)

    def of(self, file: str) -> int:
        """The descriptor of a path. Raises OSError."""
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self._path_of(file), os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[file]

    def path_of(self, file: str) -> str:
        """A path to a file that is open, for as long as this object lives: by its number it is that file, even if its
        name is another's by now.
        """
        by_number = f"/proc/self/fd/{self._descriptors.get(file)}"
        return by_number if os.path.exists(by_number) else file

    def opened_again(self, *, scattered: bool) -> Descriptors:
        """The same files with positions and readahead of their own. Raises OSError.

        Args:
            scattered: as for `Reader`.
        """
        again = Descriptors()
        for file in self._descriptors:
            opened = again._descriptors[file] = os.open(self.path_of(file), os.O_RDONLY | os.O_CLOEXEC)
            if scattered and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_RANDOM)
        return again

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class _Tools(NamedTuple):
    """What a thread reads with: descriptors of its own, since readers of one spoil each other's order, and a buffer."""

    files: Descriptors
    buffer: memoryview


def joined(extents: Iterable[Extent]) -> list[Extent]:
    """Extents in the order of the files; those that follow each other there as one."""
    found: list[Extent] = []
    for extent in sorted(extents):
        if found and (found[-1].file, found[-1].offset_bytes + found[-1].n_bytes) == extent[:2]:
            found[-1] = found[-1]._replace(n_bytes=found[-1].n_bytes + extent.n_bytes)
        else:
            found.append(extent)
    return found


def _chunks(extent: Extent) -> Iterable[Extent]:
    for at in range(0, extent.n_bytes, _CHUNK_BYTES):
        yield Extent(extent.file, extent.offset_bytes + at, min(_CHUNK_BYTES, extent.n_bytes - at))


def ask_for(extent: Extent, files: Descriptors) -> int:
    """Have the kernel read what of an extent is not cached, without waiting. Returns the bytes that were not.

    For pieces of up to a megabyte here and there this takes a third of the processor's time that reading by threads
    does, and is as fast.

    Raises:
        TruncatedFileError: the file ends before the extent does.
        UnreadableFileError: the file cannot be opened.
    """
    with _named(extent.file):
        descriptor = files.of(extent.file)
        n_missing = _n_missing(descriptor, extent)
        if n_missing and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, extent.offset_bytes, extent.n_bytes, os.POSIX_FADV_WILLNEED)
        return n_missing


def read_plainly(extent: Extent, files: Descriptors, buffer: memoryview | None = None) -> None:
    """Read an extent into the page cache, and find out whether it can be read. Raises as `ask_for`."""
    buffer = memoryview(bytearray(min(_READ_BYTES, extent.n_bytes))) if buffer is None else buffer
    with _named(extent.file):
        descriptor, at = files.of(extent.file), extent.offset_bytes
        end = at + extent.n_bytes
        while at < end:
            n = os.preadv(descriptor, [buffer[: end - at]], at)
            if n == 0:
                raise TruncatedFileError.since_opened(extent.file, end, at)
            at += n


def _read(own: threading.local, files: Descriptors, scattered: bool, chunk: Extent) -> int:
    """Read a chunk, unless it is cached. Returns the bytes that were not."""
    tools: _Tools | None = getattr(own, "tools", None)
    if tools is None:
        with _named(chunk.file):
            again = files.opened_again(scattered=scattered)
        tools = own.tools = _Tools(again, memoryview(bytearray(_READ_BYTES)))
    with _named(chunk.file):
        n_missing = _n_missing(tools.files.of(chunk.file), chunk)
    if n_missing:
        read_plainly(chunk, tools.files, tools.buffer)
    return n_missing


def _n_missing(descriptor: int, extent: Extent) -> int:
    end, size = extent.offset_bytes + extent.n_bytes, os.fstat(descriptor).st_size
    if size < end:
        raise TruncatedFileError.since_opened(extent.file, end, size)
    return extent.n_bytes - (resident_bytes(descriptor, extent.offset_bytes, extent.n_bytes) or 0)


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Errors of the operating system as those of a weight file."""
    try:
        yield
    except UnreadableFileError:
        raise
    except OSError as error:
        raise UnreadableFileError("a weight file cannot be read", file=file, found=error.strerror) from error
