"""Reading chunks of files, through the page cache or past it, whichever turns out to be faster.

What is in the page cache is read from there. Of a file that is not, the first chunks are read in both ways by turns,
side by side, and the rest in the way that was faster: the trial is part of the work and costs nothing. Past the page
cache (O_DIRECT) nothing is copied by the processor and no page is allocated; but nothing is read ahead either, and the
next load finds nothing cached. Which of the two wins depends on the disk and the processor, so it is not assumed.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from time import perf_counter
from types import TracebackType

from fastload.errors import TruncatedFileError, UnreadableFileError
from fastload.formats.chunks import Chunk, Read
from fastload.reports import format_bytes
from fastload.storage.residency import file_system, residency

__all__ = ["Choice", "ChunkFiles"]

_PAGE = mmap.PAGESIZE
# Chunks that each way is tried with. The first ones of a disk are slower than those that follow.
_N_TRIALS = 6
# Between two looks whether to go on.
_READ_BYTES = 4 << 20
# What a file system says that has no reads past the page cache, or not of such pages.
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


class Choice:
    """How the files of one transfer are read. Shared by its readers.

    Attributes:
        is_cold: some of them come from a disk or over a network.

    Args:
        files: the files.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self._lock = threading.Lock()
        files = tuple(files)
        self._trial_files = {file for file in files if _is_worth_a_trial(file)}
        self.is_cold = bool(self._trial_files) or any(file_system(file).is_network for file in files)
        self._n_begun = 0
        self._n_done = {True: 0, False: 0}
        self._n_bytes = {True: 0, False: 0}
        self._seconds = {True: 0.0, False: 0.0}
        self._refused = ""
        self._decided: bool | None = None

    def is_direct(self, file: str) -> bool:
        """Whether the next chunk of a file is to be read past the page cache."""
        with self._lock:
            if file not in self._trial_files or self._refused:
                return False
            if self._decided is not None:
                return self._decided
            self._n_begun += 1
            return self._n_begun % 2 == 1

    def tell(self, is_direct: bool, n_bytes: int, seconds: float) -> None:
        """Note how long a chunk of a file that is on trial took."""
        with self._lock:
            self._n_done[is_direct] += 1
            self._n_bytes[is_direct] += n_bytes
            self._seconds[is_direct] += seconds
            if self._decided is None and min(self._n_done.values()) >= _N_TRIALS:
                self._decided = self._rate(True) > self._rate(False)

    def refuse(self, reason: str) -> None:
        """Note that the file system does not allow reads past the page cache."""
        with self._lock:
            self._refused = reason

    def is_tried(self, file: str) -> bool:
        """Whether a file is read in both ways, for their times to be compared."""
        return file in self._trial_files

    def _rate(self, is_direct: bool) -> float:
        """Bytes a second of one reader."""
        return self._n_bytes[is_direct] / max(self._seconds[is_direct], 1e-9)

    def __str__(self) -> str:
        if not self._trial_files:
            return "from the page cache"
        if self._refused:
            return f"through the page cache, since O_DIRECT is refused ({self._refused})"
        past, through = (f"{format_bytes(int(self._rate(way)))}/s" for way in (True, False))
        rates = f"{past} a reader past it, {through} through it"
        if self._decided is None:
            return f"past and through the page cache by turns, as it was too little to choose ({rates})"
        return f"{'past' if self._decided else 'through'} the page cache ({rates})"


class ChunkFiles:
    """The files that one reader reads chunks of, with descriptors of its own: readers that share one spoil its order.

    Args:
        choice: how they are read.
        path_of: file -> the path to open it by.
    """

    def __init__(self, choice: Choice, path_of: Callable[[str], str] = str) -> None:
        self._choice = choice
        self._path_of = path_of
        self._descriptors: dict[tuple[str, bool], int] = {}
        self._closing = ExitStack()

    def read(self, chunk: Chunk, slot: memoryview, stop: threading.Event) -> bool:
        """Read a chunk into a slot, which begins on a page. Returns False if it was stopped.

        Raises:
            TruncatedFileError: the file ends before the chunk does.
            UnreadableFileError: it cannot be opened or read.
        """
        begin = perf_counter()
        is_direct = self._choice.is_direct(chunk.file)
        try:
            for read in chunk.reads:
                done = self._read_directly(chunk.file, read, slot, stop) if is_direct else 0
                if not self._read_plainly(chunk.file, read, slot, done, stop):
                    return False
        except OSError as error:
            if isinstance(error, UnreadableFileError):
                raise
            raise UnreadableFileError(
                "a weight file cannot be read", file=chunk.file, found=error.strerror or str(error)
            ) from error
        if self._choice.is_tried(chunk.file):
            self._choice.tell(is_direct, chunk.n_read_bytes, perf_counter() - begin)
        return True

    def _read_plainly(self, file: str, read: Read, slot: memoryview, done: int, stop: threading.Event) -> bool:
        descriptor = self._descriptor(file, is_direct=False)
        while done < read.n_bytes:
            if stop.is_set():
                return False
            n = min(_READ_BYTES, read.n_bytes - done)
            at = read.at_bytes + done
            n_read = os.preadv(descriptor, [slot[at : at + n]], read.offset_bytes + done)
            if not n_read:
                raise TruncatedFileError.since_opened(
                    file, read.offset_bytes + read.n_bytes, os.fstat(descriptor).st_size
                )
            done += n_read
        return True

    def _read_directly(self, file: str, read: Read, slot: memoryview, stop: threading.Event) -> int:
        """Read whole pages past the page cache, as far as there are whole ones. Returns the bytes that are there."""
        lead = read.offset_bytes % _PAGE
        begin, at = read.offset_bytes - lead, read.at_bytes - lead
        try:
            descriptor = self._descriptor(file, is_direct=True)
            end = read.offset_bytes + read.n_bytes
            # Past the end of the file there are no pages: the last bytes come through the page cache.
            end = min(-(-end // _PAGE) * _PAGE, os.fstat(descriptor).st_size // _PAGE * _PAGE)
            done = 0
            while begin + done < end and not stop.is_set():
                n = min(_READ_BYTES, end - begin - done)
                n_read = os.preadv(descriptor, [slot[at + done : at + done + n]], begin + done)
                done += n_read
                if n_read < n:
                    break
        except OSError as error:
            if error.errno in _REFUSALS:
                self._choice.refuse(error.strerror or str(error))
                return 0
            raise
        return max(0, min(done - lead, read.n_bytes))

    def _descriptor(self, file: str, *, is_direct: bool) -> int:
        descriptor = self._descriptors.get((file, is_direct))
        if descriptor is None:
            flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if is_direct else 0)
            descriptor = self._descriptors[file, is_direct] = os.open(self._path_of(file), flags)
            self._closing.callback(os.close, descriptor)
        return descriptor

    def __enter__(self) -> ChunkFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.close()


def _is_worth_a_trial(file: str) -> bool:
    """Whether most of a file would come from a local disk. What a network serves is cached on purpose."""
    if not hasattr(os, "O_DIRECT") or file_system(file).is_network:
        return False
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # who reads it will say so
        return False
    try:
        found = residency(descriptor)
    finally:
        os.close(descriptor)
    return found.n_resident_bytes is not None and 2 * found.n_cold_bytes > found.n_bytes
