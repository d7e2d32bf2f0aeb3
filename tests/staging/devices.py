"""Devices that do what `CpuDevice` does, later or not at all. Real ones: they allocate, copy and end as it does."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from fastload.storage.cpu_device import CpuDevice, CpuStream
from fastload.storage.devices import PinnedMemory


class CountingDevice(CpuDevice):
    """Counts what it pins and allocates."""

    def __init__(self, name: str = "cuda:0", capacity_bytes: int | None = None) -> None:
        super().__init__(name, capacity_bytes)
        self.kind = f"counting {id(self)}"  # so that its pinned memory is shared with no other test
        self.n_pins = 0
        self.allocated: list[int] = []
        self._lock = threading.Lock()

    def pin(self, n_bytes: int) -> PinnedMemory:
        with self._lock:
            self.n_pins += 1
        return super().pin(n_bytes)

    def allocate(self, sizes: list[int]) -> list[torch.Tensor]:  # type: ignore[override]
        made = super().allocate(sizes)
        self.allocated += sizes
        return made


class GatedDevice(CountingDevice):
    """Its streams copy nothing until the gate is opened, or only the first so many parts."""

    def __init__(self, n_free: int = 0) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.is_held = threading.Event()  # a copy is waiting for the gate
        self.n_free = n_free

    def open_stream(self) -> CpuStream:
        return _GatedStream(self)


class _GatedStream(CpuStream):
    def __init__(self, device: GatedDevice) -> None:
        self._device = device
        self._n_copies = 0
        super().__init__()

    def _copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._n_copies += 1
        if self._n_copies > self._device.n_free:
            self._device.is_held.set()
            self._device.gate.wait()
        super()._copy(destination, source)


class ActingDevice(CountingDevice):
    """Its streams do something before the copy of a number."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.number = number
        self.act = act

    def open_stream(self) -> CpuStream:
        return _ActingStream(self)


class _ActingStream(CpuStream):
    def __init__(self, device: ActingDevice) -> None:
        self._device = device
        self._n_copies = 0
        super().__init__()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._n_copies += 1
        if self._n_copies == self._device.number:
            self._device.act()
        super().copy(destination, source)
