"""Fresh memory for tensors that are about to be written, and the size of the pages it comes in.

The first write to a page costs a fault, and for memory that is written once the faults are most of the cost. Huge
pages (2 MiB instead of 4 KiB) take 5 to 7 GB/s where small ones take 2.2, if the machine has them at hand. If it has to
move others out of the way first, or is a virtual machine whose host has to find them, they fall to 0.3 GB/s: for
seconds, and then no longer. No trial on a few megabytes can tell, since it gets the pages that it gave back the time
before. So of every range the first huge page is the trial: if it takes longer than as many small ones, the rest comes
in small pages.

Measured by thread time, one thread, writing 16 MiB at a time until 2 GiB were held, on a shared virtual machine.
"""

from __future__ import annotations

import mmap
import time
from contextlib import suppress
from functools import cache

import numpy as np
import torch

from fastload.dtypes import DTYPES, DType
from fastload.storage.mapping import array_type

__all__ = ["HUGE_PAGE", "HugePages", "Slab"]

HUGE_PAGE = 2 << 20
_ADVICE = {True: getattr(mmap, "MADV_HUGEPAGE", None), False: getattr(mmap, "MADV_NOHUGEPAGE", None)}
# After huge pages were slow, so many bytes pass before they are tried again; the double after each time in vain.
_FIRST_PAUSE_BYTES = 16 << 20
_LAST_PAUSE_BYTES = 256 << 20


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
        slack = HUGE_PAGE if n_bytes >= HUGE_PAGE else 0
        self._memory = mmap.mmap(-1, n_bytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if slack:
            address = torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr()
            self._begin = -address % HUGE_PAGE

    def tensor(self, dtype: DType, offset_bytes: int, n_elements: int) -> torch.Tensor:
        """A flat tensor on a storage of exactly its size, which keeps the slab alive."""
        kind, _, viewed_as = array_type(dtype)
        tensor = torch.from_numpy(np.ndarray((n_elements,), kind, self._memory, self._begin + offset_bytes))
        return tensor if viewed_as is None else tensor.view(viewed_as)

    def huge_pages_of(self, offset_bytes: int, n_bytes: int) -> range:
        """Offsets of the huge pages that begin in a range and end in the slab."""
        begin = -(-offset_bytes // HUGE_PAGE) * HUGE_PAGE
        return range(begin, min(offset_bytes + n_bytes, self.n_bytes - HUGE_PAGE + 1), HUGE_PAGE)

    def advise(self, pages: range, *, huge: bool) -> None:
        """Ask for huge pages, or for small ones, where these huge pages could be. For memory that is untouched."""
        advice = _ADVICE[huge]
        if pages and advice is not None:
            with suppress(OSError):  # a kernel that has but one size
                self._memory.madvise(advice, self._begin + pages[0], len(pages) * HUGE_PAGE)

    def touch(self, offset_bytes: int, n_bytes: int) -> float:
        """Write to every small page of a range. Returns the seconds that this thread took."""
        touched = self.tensor(DTYPES["U8"], offset_bytes, n_bytes)[:: mmap.PAGESIZE]
        begin = time.thread_time()
        touched.zero_()
        return time.thread_time() - begin


class HugePages:
    """Asks for huge pages while they come faster than small ones do. May be shared by threads."""

    def __init__(self) -> None:
        self._pause_bytes = _FIRST_PAUSE_BYTES
        self._wait_bytes = 0

    def prepare(self, slab: Slab, offset_bytes: int, n_bytes: int) -> None:
        """Choose the pages of a range that is about to be written, the ranges of a slab in their order."""
        pages = slab.huge_pages_of(offset_bytes, n_bytes)
        if self._wait_bytes > 0:
            self._wait_bytes -= n_bytes
            slab.advise(pages, huge=False)
        elif pages:
            slab.advise(pages[:1], huge=True)
            is_fast = slab.touch(pages[0], 1) < _small_pages_seconds()
            slab.advise(pages[1:], huge=is_fast)
            self._learn(is_fast)

    def _learn(self, is_fast: bool) -> None:
        if is_fast:
            self._pause_bytes = _FIRST_PAUSE_BYTES
        else:
            self._wait_bytes = self._pause_bytes
            self._pause_bytes = min(2 * self._pause_bytes, _LAST_PAUSE_BYTES)


@cache
def _small_pages_seconds() -> float:
    """What the faults of one huge page cost when it is made of small ones: tried once a process, in 3 ms."""
    slab = Slab(3 * HUGE_PAGE)
    slab.advise(slab.huge_pages_of(0, slab.n_bytes), huge=False)
    return min(slab.touch(at, HUGE_PAGE) for at in range(0, slab.n_bytes, HUGE_PAGE))
