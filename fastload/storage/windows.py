"""Windows of files that a device copies from where they lie: pages of a memory file system, registered with the driver.

No processor copies on the way, and no slot is filled. To register pages takes time too: the driver looks up and pins
each. Reading into slots that are pinned already is often faster, and it is tried which is (as in
`fastload.storage.direct`). What is registered once and kept for the next load of the same files costs nothing then; it
is kept where all that a load registers may stay pinned.

Only files of memory file systems (tmpfs): their pages are in memory whatever happens. To pin what the page cache has of
a disk would take that memory from everybody else, for bytes that the kernel can read again. (hugetlbfs holds no
checkpoints: its files are whole huge pages, and longer than what a header says.)
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from fastload.errors import DeviceMemoryError
from fastload.formats.chunks import Chunk, Part
from fastload.reports import format_bytes
from fastload.storage.devices import Device, Event
from fastload.storage.residency import file_system

__all__ = ["Window", "Windows", "free_kept_windows", "kept_window_bytes"]

_PAGE = mmap.PAGESIZE
# Chunks that each way is tried with.
_N_TRIALS = 6
# A window that is mostly what nobody asked for is not worth its pages.
_MOST_WASTE = 2


class Window:
    """A range of a file, mapped read-only and registered with a device.

    Args:
        descriptor: the file.
        begin_bytes: where the window begins, on a page.
        n_bytes: its length.
        device: who copies from it.

    Raises:
        DeviceMemoryError: the driver does not register it.
        OSError: it cannot be mapped.
    """

    def __init__(self, descriptor: int, begin_bytes: int, n_bytes: int, device: Device) -> None:
        self._mapping = mmap.mmap(descriptor, n_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=begin_bytes)
        self.n_bytes = n_bytes
        self._begin_bytes = begin_bytes
        self._device = device
        self._address = np.frombuffer(self._mapping, np.uint8).ctypes.data
        device.register(self._address, n_bytes)
        # torch has no tensors that are only read, and would warn of this one.
        self._tensor = torch.frombuffer((ctypes.c_uint8 * n_bytes).from_address(self._address), dtype=torch.uint8)

    def source(self, chunk: Chunk, part: Part) -> torch.Tensor:
        """The bytes of a part. The window must live until they have been copied."""
        read = next(read for read in reversed(chunk.reads) if read.at_bytes <= part.at_bytes)
        at = read.offset_bytes + part.at_bytes - read.at_bytes - self._begin_bytes
        return self._tensor[at : at + part.n_bytes]

    def close(self) -> None:
        """End the registration. No copy from it is under way any more."""
        self._device.unregister(self._address)


class _Key(NamedTuple):
    """What a window shows: the same bytes for as long as all of this is the same."""

    kind: str
    device: int
    inode: int
    n_file_bytes: int
    modified_ns: int
    changed_ns: int
    begin_bytes: int
    n_bytes: int


class _Kept:
    """Windows that no transfer uses, the longest unused first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: OrderedDict[_Key, Window] = OrderedDict()

    def take(self, key: _Key) -> Window | None:
        with self._lock:
            return self._windows.pop(key, None)

    def put(self, key: _Key, window: Window, most_bytes: int) -> None:
        """Keep a window; so many bytes stay registered at most."""
        with self._lock:
            ended = [old for old in [self._windows.pop(key, None)] if old is not None]
            self._windows[key] = window
            n_bytes = sum(one.n_bytes for one in self._windows.values())
            while n_bytes > most_bytes:
                _, oldest = self._windows.popitem(last=False)
                n_bytes -= oldest.n_bytes
                ended.append(oldest)
        for one in ended:
            one.close()

    def n_bytes(self) -> int:
        with self._lock:
            return sum(window.n_bytes for window in self._windows.values())

    def free(self) -> int:
        with self._lock:
            windows, self._windows = list(self._windows.values()), OrderedDict()
        for window in windows:
            window.close()
        return sum(window.n_bytes for window in windows)

    def forget(self) -> None:
        """In a forked child: the registrations are the parent's."""
        self._lock = threading.Lock()
        self._windows = OrderedDict()


_kept = _Kept()
os.register_at_fork(after_in_child=_kept.forget)


def free_kept_windows() -> int:
    """End the registrations that are kept for the next load. Returns their bytes."""
    return _kept.free()


def kept_window_bytes() -> int:
    """Bytes of files that are registered, and kept so for the next load."""
    return _kept.n_bytes()


class _Open(NamedTuple):
    """A window that is in use, and the seconds that it took to open."""

    key: _Key
    window: Window
    seconds: float


class Windows:
    """The windows of one transfer. Shared by its readers.

    Attributes:
        is_possible: some of the files lie in memory, and there is room for pages of them.

    Args:
        device: who copies from them.
        chunks: what is sent.
        most_bytes: what may be registered at a time.
        path_of: file -> the path to open it by.
    """

    def __init__(
        self, device: Device, chunks: Iterable[Chunk], most_bytes: int, path_of: Callable[[str], str] = str
    ) -> None:
        self._device = device
        self._most_bytes = most_bytes
        self._path_of = path_of
        chunks = tuple(chunks)
        files = dict.fromkeys(chunk.file for chunk in chunks) if most_bytes else ()
        self._files = {file for file in files if file_system(file).is_memory}
        self.is_possible = bool(self._files)
        n_bytes = sum(_range(chunk)[1] for chunk in chunks if chunk.file in self._files)
        self._keeps = n_bytes <= most_bytes
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._used: deque[tuple[_Open, Event]] = deque()
        self._n_open_bytes = 0
        self._n_begun = 0
        self._n_done = {True: 0, False: 0}
        self._n_bytes = {True: 0, False: 0}
        self._seconds = {True: 0.0, False: 0.0}
        self._refused = ""
        self._decided: bool | None = True if self._keeps else None

    def open(self, chunk: Chunk) -> Window | None:
        """A window of all that a chunk reads; None where it shall be read, or there is no room for one more."""
        begin_bytes, n_bytes = _range(chunk)
        if chunk.file not in self._files or n_bytes > _MOST_WASTE * chunk.n_read_bytes + 2 * _PAGE:
            return None
        self._reclaim()
        with self._lock:
            if self._refused or not self._is_next() or self._n_open_bytes + n_bytes > self._most_bytes:
                return None
            self._n_open_bytes += n_bytes
        begin = perf_counter()
        try:
            key, window = self._opened(chunk.file, begin_bytes, n_bytes)
        except (DeviceMemoryError, OSError) as error:
            with self._lock:
                self._n_open_bytes -= n_bytes
                self._refused = getattr(error, "found", None) or str(error)
            return None
        with self._lock:
            self._open[id(window)] = _Open(key, window, perf_counter() - begin)
        return window

    def tell_read(self, file: str, n_bytes: int, seconds: float) -> None:
        """Note how long a chunk took that was read."""
        if file in self._files:
            self._tell(False, n_bytes, seconds)

    def give_back(self, window: Window, event: Event) -> None:
        """The window is not needed once the event is done."""
        with self._lock:
            self._used.append((self._open.pop(id(window)), event))

    def close(self) -> None:
        """Keep all windows for the next transfer, or end their registrations. No copy is under way."""
        with self._lock:
            ended = [one for one, _ in self._used] + list(self._open.values())
            self._used.clear()
            self._open.clear()
            descriptors, self._descriptors = self._descriptors, {}
        for one in ended:
            self._end(one)
        for descriptor in descriptors.values():
            os.close(descriptor)

    def __str__(self) -> str:
        if self._refused:
            return f"; their pages cannot be registered ({self._refused})"
        registered, read = (f"{format_bytes(int(self._rate(way)))}/s" for way in (True, False))
        if self._keeps:
            return "; their pages are registered with the driver, and stay so for the next load"
        rates = f"{registered} a reader registered, {read} read"
        if self._decided is None:
            return f"; pages registered and read by turns, as it was too little to choose ({rates})"
        return f"; {'pages registered with the driver' if self._decided else 'read'}, which is faster ({rates})"

    def _is_next(self) -> bool:
        """Whether the next chunk is to be registered."""
        if self._decided is not None:
            return self._decided
        self._n_begun += 1
        return self._n_begun % 2 == 1

    def _opened(self, file: str, begin_bytes: int, n_bytes: int) -> tuple[_Key, Window]:
        with self._lock:
            descriptor = self._descriptors.get(file)
            if descriptor is None:
                descriptor = self._descriptors[file] = os.open(self._path_of(file), os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if status.st_size < begin_bytes + n_bytes:
            raise OSError("the file ends before")  # reading it tells so
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        key = _Key(self._device.kind, *identity, begin_bytes, n_bytes)
        return key, _kept.take(key) or Window(descriptor, begin_bytes, n_bytes, self._device)

    def _reclaim(self) -> None:
        """Have an end with windows whose copies are done."""
        while True:
            with self._lock:
                if not self._used or not self._used[0][1].is_done():
                    return
                one, _ = self._used.popleft()
            self._end(one)

    def _end(self, one: _Open) -> None:
        begin = perf_counter()
        if self._keeps:
            _kept.put(one.key, one.window, self._most_bytes)
        else:
            one.window.close()
        self._tell(True, one.window.n_bytes, one.seconds + perf_counter() - begin)
        with self._lock:
            self._n_open_bytes -= one.window.n_bytes

    def _tell(self, is_registered: bool, n_bytes: int, seconds: float) -> None:
        with self._lock:
            self._n_done[is_registered] += 1
            self._n_bytes[is_registered] += n_bytes
            self._seconds[is_registered] += seconds
            if self._decided is None and min(self._n_done.values()) >= _N_TRIALS:
                self._decided = self._rate(True) > self._rate(False)

    def _rate(self, is_registered: bool) -> float:
        """Bytes a second of one reader."""
        return self._n_bytes[is_registered] / max(self._seconds[is_registered], 1e-9)


def _range(chunk: Chunk) -> tuple[int, int]:
    """Where the reads of a chunk begin in the file, on a page, and how far they reach."""
    begin = min(read.offset_bytes for read in chunk.reads) // _PAGE * _PAGE
    return begin, max(read.offset_bytes + read.n_bytes for read in chunk.reads) - begin
