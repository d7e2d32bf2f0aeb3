"""The pipeline to a device: readers fill pinned slots, one thread sends them on, in order.

    file -> page cache -> pinned slot -> device          memory file system -> device, where registering is faster

Readers take chunks in order, each with a slot of the ring; there are no more slots than the ring has, so they wait for
copies where these are slower. The sender waits for the chunk that is next, enqueues its copies on a stream of its own
and gives the slot back with the event that ends them. Conversions and boxes pass through a scratch on the device, in
the order of the stream; a copy that converts on its way from the host would be many times slower. After the last chunk
of a group an event is kept, for which a forward can have its own stream wait.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from types import TracebackType

import torch

from fastload.dtypes import DType, to_torch
from fastload.errors import BlockError
from fastload.formats.chunks import Chunk, Part
from fastload.formats.specs import contiguous_stride
from fastload.storage.crew import Start, Work, start_thread
from fastload.storage.devices import Device, Event, PinnedMemory
from fastload.storage.direct import Choice, ChunkFiles
from fastload.storage.ring import Ring, Turn
from fastload.storage.windows import Window, Windows

__all__ = ["Transfer", "typed"]

_MOST_READERS = 12


class Transfer:
    """Chunks on their way to one device. It is under way from the moment it is made, on threads of its own.

    Use it as a context manager, or call `cancel` where it is not waited for: its threads end, its ring goes back to
    the pool, and no copy is under way, whether it has come to its end, has failed, or was cancelled.

    Args:
        device: where to.
        chunks: what to read and where it goes, group by group.
        buffers: flat tensors of bytes on the device, by the numbers that the chunks' parts name. They must live until
            the transfer has ended.
        scratch: such a tensor as large as the largest part that is converted or a box.
        ring: the slots; as large as the chunks ask for. The transfer closes it.
        windows: of files that are sent from where they lie. The transfer closes them.
        advance: called on a thread of the transfer with the bytes of each chunk that was sent.
        path_of: file -> the path to open it by.
        start: begins its threads.
    """

    def __init__(
        self,
        device: Device,
        chunks: Sequence[Chunk],
        buffers: Sequence[torch.Tensor],
        scratch: torch.Tensor,
        ring: Ring,
        windows: Windows,
        advance: Callable[[int], None] = lambda n_bytes: None,
        path_of: Callable[[str], str] = str,
        start: Start = start_thread,
    ) -> None:
        self._device = device
        self._start = start
        self._path_of = path_of
        self._chunks = tuple(chunks)
        self._buffers = buffers
        self._scratch = scratch
        self._ring = ring
        self._windows = windows
        self._advance = advance
        self._choice = Choice(dict.fromkeys(chunk.file for chunk in self._chunks))
        self._last_of_group = {chunk.group: index for index, chunk in enumerate(self._chunks)}
        self._changed = threading.Condition()
        self._n_promised = 0  # chunks that a reader has a slot for, or waits for one
        self._n_taken = 0
        self._filled: dict[int, PinnedMemory | Window] = {}
        self._events: dict[int, Event] = {}
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._ended = False
        self._own: set[int] = set()  # its threads
        self._stream = device.open_stream()
        self._n_readers = min(_n_readers(self._choice), len(self._chunks))
        self._readers: list[Work] = []
        self._has_begun = self._is_abandoned = False
        try:
            self._sender = start(self._send_all, "fastload-sender")
        except BaseException as error:
            # Ctrl-C may come when the thread has begun: then it ends everything, as ever.
            self._fail(error)
            with self._changed:
                self._is_abandoned = not self._has_begun
            if self._is_abandoned:
                self._stream.close()
                windows.close()
                ring.close()
            raise

    @property
    def note(self) -> str:
        """How it reads, for a report."""
        how = f"{self._choice}{self._windows}" if self._windows.is_possible else str(self._choice)
        return f"to {self._device.name} by {self._n_readers} readers, {how}"

    def wait(self, group: int | None = None) -> None:
        """Block until a group is on the device; None for all of them, and the end of the transfer.

        Raises:
            TruncatedFileError, UnreadableFileError: a file could not be read.
            DeviceMemoryError: no host memory could be pinned.
            BlockError: it was cancelled before.
        """
        if group is not None:
            event = self._event(group)
            if event is not None:
                event.wait()
            return
        # Not by the condition: ctrl-C in the midst of taking its lock would leave it taken, and the sender waiting.
        self._sender.join()
        if self._error is not None:
            raise self._error

    def hold_back(self, group: int) -> None:
        """Have what this thread asks of the device from now on wait for a group. Raises as `wait`.

        It blocks until the group's copies are enqueued, and not until they are done.
        """
        event = self._event(group)
        if event is not None:
            self._device.hold_back(event)

    def cancel(self) -> None:
        """End it, wherever it is; returns when its threads have ended. Nothing happens if it has come to its end.

        On one of these threads, where garbage may come to be collected, it does not wait.
        """
        with self._changed:
            if not self._ended and self._error is None:
                self._error = BlockError("the transfer to a device was cancelled", found=self._device.name)
        self._halt()
        if threading.get_ident() not in self._own:
            self._sender.join()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def _event(self, group: int) -> Event | None:
        """The event of a group, when its copies have been enqueued; None where it has no bytes."""
        if group not in self._last_of_group:
            return None
        with self._changed:
            while group not in self._events:
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            return self._events[group]

    def _read_all(self) -> None:
        self._own.add(threading.get_ident())
        try:
            self._device.set_current()
            with ChunkFiles(self._choice, self._path_of) as files:
                while self._promise():
                    turn = self._ring.turn()
                    if turn is None:
                        return
                    with self._changed:
                        index = self._n_taken
                        self._n_taken += 1
                    filled = self._fill(self._chunks[index], turn, files)
                    if filled is None:
                        return
                    with self._changed:
                        self._filled[index] = filled
                        self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  raised to who waits
            self._fail(error)

    def _fill(self, chunk: Chunk, turn: Turn, files: ChunkFiles) -> PinnedMemory | Window | None:
        """A chunk where a device can copy it from: read into a slot, or where it lies. None if the transfer is over."""
        window = self._windows.open(chunk)
        if window is not None:
            self._ring.forgo(turn)
            return window
        slot = self._ring.slot(turn)
        begin = perf_counter()
        if not files.read(chunk, slot.bytes, self._stop):
            return None
        self._windows.tell_read(chunk.file, chunk.n_read_bytes, perf_counter() - begin)
        return slot

    def _promise(self) -> bool:
        """Whether there is another chunk to be read. A slot is asked for only where there is."""
        with self._changed:
            if self._stop.is_set() or self._n_promised == len(self._chunks):
                return False
            self._n_promised += 1
            return True

    def _send_all(self) -> None:
        self._own.add(threading.get_ident())
        with self._changed:
            if self._is_abandoned:
                return
            self._has_begun = True
        try:
            self._device.set_current()
            for number in range(self._n_readers):
                self._readers.append(self._start(self._read_all, f"fastload-staging-{number}"))
            event: Event | None = None
            for index, chunk in enumerate(self._chunks):
                filled = self._when_filled(index)
                if filled is None:
                    return
                event = self._send_chunk(chunk, filled)
                if self._last_of_group[chunk.group] == index:
                    with self._changed:
                        self._events[chunk.group] = event
                        self._changed.notify_all()
                self._advance(chunk.n_bytes)
            if event is not None:
                event.wait()
        except BaseException as error:  # noqa: BLE001  raised to who waits
            self._fail(error)
        finally:
            self._end()

    def _when_filled(self, index: int) -> PinnedMemory | Window | None:
        """Where a chunk can be copied from, as soon as it can; None if the transfer is to stop."""
        with self._changed:
            while index not in self._filled and not self._stop.is_set():
                self._changed.wait()
            return self._filled.pop(index, None) if not self._stop.is_set() else None

    def _send_chunk(self, chunk: Chunk, filled: PinnedMemory | Window) -> Event:
        with self._stream.chosen():
            for part in chunk.parts:
                if isinstance(filled, Window):
                    self._send(part, filled.source(chunk, part))
                else:
                    self._send(part, filled.tensor.narrow(0, part.at_bytes, part.n_bytes))
        event = self._stream.record()
        if isinstance(filled, Window):
            self._windows.give_back(filled, event)
        else:
            self._ring.give_back(filled, event)
        return event

    def _send(self, part: Part, source: torch.Tensor) -> None:
        buffer = self._buffers[part.buffer]
        if part.is_plain:
            self._stream.copy(buffer.narrow(0, part.offset_bytes, part.n_bytes), source)
            return
        self._stream.copy(self._scratch.narrow(0, 0, part.n_bytes), source)
        shape = part.shape or (part.n_bytes // part.source.itemsize,)
        self._stream.copy(
            typed(buffer, part.dtype, part.offset_bytes, shape, part.stride or None),
            typed(self._scratch, part.source, 0, shape),
        )

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
        self._halt()

    def _halt(self) -> None:
        self._stop.set()
        self._ring.stop()
        with self._changed:
            self._changed.notify_all()

    def _end(self) -> None:
        """The last of the sender: nothing reads, nothing copies, and the slots are the pool's."""
        self._halt()
        for reader in self._readers:
            reader.join()
        try:
            self._stream.close()
        finally:
            self._windows.close()
            self._ring.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()


def typed(
    buffer: torch.Tensor,
    dtype: DType,
    offset_bytes: int,
    shape: Sequence[int],
    stride: Sequence[int] | None = None,
) -> torch.Tensor:
    """A tensor on the memory of a flat tensor of bytes; no view of it, but one that shares its storage."""
    if stride is None:
        stride = contiguous_stride(tuple(shape))
    begin = buffer.storage_offset() + offset_bytes
    empty = torch.empty(0, dtype=to_torch(dtype), device=buffer.device)
    return empty.set_(buffer.untyped_storage(), begin // dtype.itemsize, tuple(shape), tuple(stride))


def _n_readers(choice: Choice) -> int:
    """As many as there are processors for what is in memory; more where they wait for a disk."""
    if choice.is_cold:
        return _MOST_READERS
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_READERS, max(2, n_cpus))
