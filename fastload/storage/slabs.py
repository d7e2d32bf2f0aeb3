"""Fresh memory for tensors that are about to be written, and the size of the pages it comes in.

The first write to a page costs a fault, and for memory that is written once the faults are most of the cost. Huge
pages (2 MiB instead of 4 KiB) take 5 to 7 GB/s where small ones take 2.2, if the machine has them at hand. If it has to
move others out of the way first, or is a virtual machine whose host has to find them, they fall to 0.3 GB/s: for
seconds, and then no longer. No trial on a few megabytes can tell, since it gets the pages that it gave back the time
before. So the pages that are really needed are the trial, and `PageChooser` goes by what they cost.

Measured by thread time, one thread, writing 16 MiB at a time until 2 GiB were held, on a shared virtual machine.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
import torch

from fastload.dtypes import DType
from fastload.storage.mapping import array_type

__all__ = ["PageChooser", "Slab"]

_HUGE_PAGE = 2 << 20
_ADVICE = {True: getattr(mmap, "MADV_HUGEPAGE", None), False: getattr(mmap, "MADV_NOHUGEPAGE", None)}
# After huge pages were slow, so many bytes pass before they are tried again; the double after each time in vain.
_FIRST_PAUSE_BYTES = 32 << 20
_LAST_PAUSE_BYTES = 512 << 20


class Slab:
    """Fresh memory for one storage or several, given back to the system when the last tensor on it dies.

    It is not touched here, so it is not memory yet.

    Args:
        n_bytes: its size, more than 0. Raises OSError where there is not so much address space.
    """

    __slots__ = ("_begin", "_memory", "n_bytes")

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._begin = 0
        slack = _HUGE_PAGE if n_bytes >= _HUGE_PAGE else 0
        self._memory = mmap.mmap(-1, n_bytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if slack:
            address = torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr()
            self._begin = -address % _HUGE_PAGE

    def tensor(self, dtype: DType, offset_bytes: int, n_elements: int) -> torch.Tensor:
        """A flat tensor on a storage of exactly its size, which keeps the slab alive."""
        kind, _, viewed_as = array_type(dtype)
        tensor = torch.from_numpy(np.ndarray((n_elements,), kind, self._memory, self._begin + offset_bytes))
        return tensor if viewed_as is None else tensor.view(viewed_as)

    def advise(self, offset_bytes: int, n_bytes: int, *, huge: bool) -> None:
        """Say which pages a range shall be made of where it is untouched. A slab's last bytes stand on small ones."""
        begin = offset_bytes // _HUGE_PAGE * _HUGE_PAGE
        end = min(-(-(offset_bytes + n_bytes) // _HUGE_PAGE), self.n_bytes // _HUGE_PAGE) * _HUGE_PAGE
        advice = _ADVICE[huge]
        if end > begin and advice is not None:
            with suppress(OSError):  # a kernel that has but one size
                self._memory.madvise(advice, self._begin + begin, end - begin)


class PageChooser:
    """Which pages to ask for, by what the last huge ones cost, and small ones at their best. May be shared by threads.

    At their best, because small pages too are slow at times; were that believed, nothing would lead away from huge
    pages that have become as slow.
    """

    def __init__(self) -> None:
        self._huge_cost: float | None = None
        self._small_cost: float | None = None
        self._pause_bytes = _FIRST_PAUSE_BYTES
        self._wait_bytes = 0

    def choose(self, n_bytes: int) -> bool:
        """Whether the next n_bytes should come in huge pages."""
        if self._huge_cost is None or self._small_cost is None:
            return self._huge_cost is None
        if self._huge_cost <= self._small_cost:
            return True
        self._wait_bytes -= n_bytes
        return self._wait_bytes < 0

    def learn(self, n_bytes: int, seconds: float, *, huge: bool) -> None:
        """Note what it took one thread to write n_bytes into pages that had been chosen."""
        cost = seconds / n_bytes
        if not huge:
            self._small_cost = min(cost, self._small_cost or cost)
            return
        self._huge_cost = cost
        if self._small_cost is None or cost <= self._small_cost:
            self._pause_bytes = _FIRST_PAUSE_BYTES
        elif self._wait_bytes <= 0:
            self._wait_bytes = self._pause_bytes
            self._pause_bytes = min(2 * self._pause_bytes, _LAST_PAUSE_BYTES)
