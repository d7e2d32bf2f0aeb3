"""The device interface in the machine's own memory, with a thread for a stream of copies.

Order, reuse and errors of a transfer are real with it, without an accelerator: what is built on the interface is tried
on it everywhere.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from fastload.storage.devices import CopyStream, Event, PinnedMemory, check_room
from fastload.storage.memory import available_bytes

__all__ = ["CpuDevice", "CpuStream"]


class CpuDevice:
    """The machine's own memory, reached as if it were a device's; the members are those of `Device`.

    Args:
        name: what it is called.
        capacity_bytes: most that one call may allocate; None for what is free.
    """

    kind = "cpu"

    def __init__(self, name: str = "cpu", capacity_bytes: int | None = None) -> None:
        self.name = name
        self._capacity_bytes = capacity_bytes

    def set_current(self) -> None:
        """Nothing: threads have no device here."""

    def free_bytes(self) -> int | None:
        return available_bytes() if self._capacity_bytes is None else self._capacity_bytes

    def alternatives(self, n_bytes: int) -> list[str]:
        return ["cpu"] * ((available_bytes() or 0) >= n_bytes)

    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        check_room(self, sum(sizes))
        return [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes]

    def pin(self, n_bytes: int) -> PinnedMemory:
        return PinnedMemory(n_bytes)

    def register(self, address: int, n_bytes: int) -> None: ...

    def unregister(self, address: int) -> None: ...

    def open_stream(self) -> CopyStream:
        return CpuStream()

    def hold_back(self, event: Event) -> None:
        event.wait()


class _CpuEvent:
    def __init__(self, stream: CpuStream) -> None:
        self._stream = stream
        self.reached = threading.Event()

    def wait(self) -> None:
        self.reached.wait()
        if self._stream.error is not None:
            raise self._stream.error

    def is_done(self) -> bool:
        return self.reached.is_set()


class CpuStream:
    """A thread that copies; the members are those of `CopyStream`.

    Attributes:
        error: what went wrong first; no copy is made after it.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fastload-copies", daemon=True)
        self._thread.start()

    def chosen(self) -> AbstractContextManager[object]:
        return nullcontext()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._tasks.put(partial(self._copy, destination, source))

    def record(self) -> Event:
        event = _CpuEvent(self)
        self._tasks.put(event.reached.set)
        return event

    def close(self) -> None:
        self._tasks.put(None)
        self._thread.join()

    def _copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        if self.error is None:
            try:
                destination.copy_(source)
            except BaseException as error:  # noqa: BLE001  raised by the events
                self.error = error

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # the memory that it names may be gone before the next one comes
