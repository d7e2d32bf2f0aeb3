"""What a transfer needs of a device: memory, pinned host memory, a stream of copies, events.

Small on purpose. `CudaDevice` is an accelerator; `cpu_device.CpuDevice` is the same thing in the machine's own memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from typing import Protocol

import torch

from fastload.errors import DeviceMemoryError, OptionError
from fastload.reports import format_bytes
from fastload.storage.memory import available_bytes

__all__ = [
    "CopyStream",
    "CudaDevice",
    "Device",
    "Devices",
    "Event",
    "PinnedMemory",
    "check_room",
    "device_for",
]

# Flags of cudaHostRegister (CUDA Runtime API, memory management): pinned for all devices of the process; never written.
_HOST_REGISTER_PORTABLE = 0x01
_HOST_REGISTER_READ_ONLY = 0x08


class Event(Protocol):
    """A point in a stream of copies."""

    def wait(self) -> None:
        """Block this thread until all copies before it are done. Raises what went wrong in one of them."""

    def is_done(self) -> bool:
        """Whether all copies before it are done."""


class CopyStream(Protocol):
    """Copies that are done one after another, while the caller goes on."""

    def chosen(self) -> AbstractContextManager[object]:
        """A block in which this thread enqueues copies. To choose a stream takes as long as one of them."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy, converted to the destination's type, the stream being chosen.

        Both must live until an event after it is done.
        """

    def record(self) -> Event:
        """An event after all copies so far."""

    def close(self) -> None:
        """Wait for all copies and end the stream. Raises nothing; what went wrong is raised by the events."""


class PinnedMemory:
    """Page-aligned host memory that a device copies from without the processor.

    It is mapped here and registered with the driver, not taken from torch's allocator, which rounds sizes up and keeps
    what it is given back.

    Attributes:
        bytes: all of it, as a buffer to read into.
        tensor: all of it, as a tensor of bytes.

    Args:
        n_bytes: its size.
        unregister: undoes the registration; called with the address.
    """

    def __init__(self, n_bytes: int, unregister: Callable[[int], None] | None = None) -> None:
        mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Huge pages are registered in a fraction of the time, and private memory comes in them where shared does not.
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel that has but one size
                mapping.madvise(mmap.MADV_HUGEPAGE)
        # A child that is forked has no use for this memory, and must not have it copied on write: a page that is
        # written after the fork moves, and the device would not know.
        if hasattr(mmap, "MADV_DONTFORK"):
            mapping.madvise(mmap.MADV_DONTFORK)
        self.bytes = memoryview(mapping)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self._unregister = unregister

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return len(self.bytes)

    @property
    def address(self) -> int:
        """Its address."""
        return self.tensor.data_ptr()

    def release(self) -> None:
        """Give the memory back. Nothing may use it any more."""
        if self._unregister is not None:
            self._unregister(self.address)
        self.tensor = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.bytes = memoryview(b"")


class Device(Protocol):
    """Where tensors are brought.

    Attributes:
        name: as torch spells it, such as ``"cuda:0"``.
        kind: devices of one kind can use the same pinned memory.
    """

    name: str
    kind: str

    def set_current(self) -> None:
        """Make it the device of this thread; a new thread's is the first one, whatever its parent's was."""

    def free_bytes(self) -> int | None:
        """Memory that can be allocated; None where that is not known."""

    def alternatives(self, n_bytes: int) -> list[str]:
        """Names of other devices on which so many bytes are free."""

    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Flat tensors of bytes, whose contents are undefined. Takes all or nothing.

        Raises:
            DeviceMemoryError: there is too little memory.
        """

    def pin(self, n_bytes: int) -> PinnedMemory:
        """Host memory that this device copies from at full rate."""

    def register(self, address: int, n_bytes: int) -> None:
        """Have this device copy from memory that is there at full rate, as from what `pin` gives; it is only read.

        It begins on a page, and stays mapped until `unregister`. Raises DeviceMemoryError if the driver refuses.
        """

    def unregister(self, address: int) -> None:
        """Undo `register`. No copy is under way."""

    def open_stream(self) -> CopyStream:
        """A stream whose copies come after what this thread has asked of the device, allocations included."""

    def hold_back(self, event: Event) -> None:
        """Have what this thread asks of the device from now on wait for an event. Returns at once where it can."""


Devices = Callable[[str], "Device | None"]
"""Gives the device of a name; None for one that is not reached through staging, such as ``"cpu"`` or ``"meta"``."""


def device_for(name: str) -> Device | None:
    """The accelerator of a name, ``"cuda"`` or ``"cuda:1"``; None for what is no CUDA device.

    Raises:
        OptionError: there is no such CUDA device, or no such kind of device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError("unknown device", expected="such as 'cpu', 'cuda' or 'cuda:1'", found=name) from error
    if device.type != "cuda":
        return None
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not n_devices:
        raise OptionError(
            "there is no CUDA device, or this torch was built without CUDA",
            expected="device='cpu', or a machine and a torch that have CUDA",
            found=name,
            fix="leave out the device to load into the machine's memory",
        )
    if (device.index or 0) >= n_devices:
        raise OptionError(
            "this machine does not have that CUDA device", expected=f"cuda:0 to cuda:{n_devices - 1}", found=name
        )
    return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


class CudaDevice:
    """One CUDA device; the members are those of `Device`."""

    kind = "cuda"

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self._device = torch.device(self.name)

    def set_current(self) -> None:
        torch.cuda.set_device(self._device)

    def free_bytes(self) -> int | None:
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def alternatives(self, n_bytes: int) -> list[str]:
        others = [_cuda_device(index) for index in range(torch.cuda.device_count())]
        fitting = [other.name for other in others if other.name != self.name and (other.free_bytes() or 0) >= n_bytes]
        return fitting + ["cpu"] * ((available_bytes() or 0) >= n_bytes)

    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        check_room(self, sum(sizes))
        made: list[torch.Tensor] = []
        try:
            self._reserve(sizes)
            made += [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        except torch.OutOfMemoryError as error:
            made.clear()
            torch.cuda.empty_cache()
            raise too_little_memory(self, sum(sizes)) from error
        return made

    def _reserve(self, sizes: Sequence[int]) -> None:
        """Have torch's allocator ask the driver for all at once; it cuts what it is given back into the pieces."""
        try:
            torch.empty(sum(-(-size // 512) * 512 for size in sizes), dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            # Not in one piece: what is free may lie between what is in use.
            torch.cuda.empty_cache()

    def pin(self, n_bytes: int) -> PinnedMemory:
        memory = PinnedMemory(n_bytes, _unregister)
        self._register(memory.address, n_bytes, _HOST_REGISTER_PORTABLE)
        return memory

    def register(self, address: int, n_bytes: int) -> None:
        self._register(address, n_bytes, _HOST_REGISTER_PORTABLE | _HOST_REGISTER_READ_ONLY)

    def unregister(self, address: int) -> None:
        _unregister(address)

    def _register(self, address: int, n_bytes: int, flags: int) -> None:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(address, n_bytes, flags))
        if code:
            self._forget_error()
            raise DeviceMemoryError(
                "the CUDA driver does not pin host memory",
                expected=f"{format_bytes(n_bytes)} to be registered",
                found=f"CUDA error {code}",
                fix="free memory, or pass a smaller pinned_memory",
            )

    def _forget_error(self) -> None:
        """Have the runtime tell what went wrong now: it tells the next who launches a kernel on this thread."""
        with suppress(RuntimeError):
            torch.empty(1, dtype=torch.uint8, device=self._device).fill_(0)

    def open_stream(self) -> CopyStream:
        return _CudaStream(self._device)

    def hold_back(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        torch.cuda.current_stream(self._device).wait_event(event.event)


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()

    def is_done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]


class _CudaStream:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Memory that was just allocated may be in use by kernels that the current stream has still to run.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def chosen(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source, non_blocking=True)

    def record(self) -> Event:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the waiting thread sleeps
        event.record(self._stream)
        return _CudaEvent(event)

    def close(self) -> None:
        self._stream.synchronize()


def check_room(device: Device, n_bytes: int) -> None:
    """Raise DeviceMemoryError where a device is known not to have so many bytes."""
    free = device.free_bytes()
    if free is not None and free < n_bytes:
        raise too_little_memory(device, n_bytes)


def too_little_memory(device: Device, n_bytes: int) -> DeviceMemoryError:
    """The error of a device on which so many bytes cannot be allocated."""
    free = device.free_bytes()
    alternatives = device.alternatives(n_bytes)
    where = f"load to {' or '.join(alternatives)}, where it fits" if alternatives else "it fits on no device here"
    return DeviceMemoryError(
        f"the weights do not fit into the memory of {device.name}",
        expected=f"{format_bytes(n_bytes)} free",
        found="unknown" if free is None else format_bytes(free),
        fix=f"{where}; or spread them with device_map='auto', or ask for a smaller dtype",
    )


@cache
def _cuda_device(index: int) -> CudaDevice:
    return CudaDevice(index)


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
