"""From a device into files: the bytes of one tensor are copied out while those of the one before are written.

The reverse of `fastload.storage.staging`, with the same pinned slots: a copy into memory that is not pinned would have
the device wait for the processor, and a copy of a whole tensor would take its size of host memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator

import torch

from fastload.storage.devices import Device, Event, PinnedMemory
from fastload.storage.ring import Ring

__all__ = ["unload"]

# Enough for one to be written, one to be hashed, and two to be on their way.
_N_SLOTS = 4


def unload(tensors: Iterable[torch.Tensor], device: Device, piece_bytes: int) -> Generator[memoryview, None, None]:
    """The bytes of tensors on a device in row-major order, in pieces; those to come are copied meanwhile.

    Close the generator where it is not read to its end: no copy is under way then, and the slots are the pool's.

    Args:
        tensors: all on that device. Of one that is not contiguous a copy is made there.
        device: where they are.
        piece_bytes: size of a piece; the last one of each tensor may be smaller, and an empty tensor has none.

    Yields:
        Memory that is good until the next piece is asked for.

    Raises:
        DeviceMemoryError: no host memory could be pinned.
    """
    ring = Ring(device, piece_bytes, _N_SLOTS)
    stream = device.open_stream()
    free: list[PinnedMemory] = []
    under_way: deque[tuple[PinnedMemory, torch.Tensor, Event]] = deque()
    try:
        for piece in _pieces(tensors, piece_bytes):
            if len(under_way) == _N_SLOTS:
                yield from _arrived(under_way, free)
            slot = free.pop() if free else ring.take()
            assert slot is not None  # nobody stops this ring
            with stream.chosen():
                stream.copy(slot.tensor[: len(piece)], piece)
            under_way.append((slot, piece, stream.record()))
        while under_way:
            yield from _arrived(under_way, free)
    finally:
        stream.close()
        ring.close()


def _arrived(
    under_way: deque[tuple[PinnedMemory, torch.Tensor, Event]], free: list[PinnedMemory]
) -> Iterator[memoryview]:
    slot, piece, event = under_way.popleft()
    event.wait()
    yield slot.bytes[: len(piece)]
    free.append(slot)


def _pieces(tensors: Iterable[torch.Tensor], piece_bytes: int) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for begin in range(0, len(flat), piece_bytes):
            yield flat[begin : begin + piece_bytes]
