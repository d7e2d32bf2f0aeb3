"""The least that a cast can cost: ``fresh_pages.py N_BYTES`` writes so many bytes of fresh memory in several bare ways.

The kernel zeroes a page when it is first written to, and that is most of the time. Ways: every byte set by threads
(memset), pages made present by threads without a write of their own (populate); small or huge pages; one thread or
one a core. The result is the best way's time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from time import perf_counter

from suite.fresh import finish

_BLOCK_BYTES = 32 << 20
_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def main(n_bytes: int) -> None:
    """Every way once; a way that the kernel does not have does not count."""
    n_cores = len(os.sched_getaffinity(0))
    found = {}
    for how, huge, n_threads in product(("memset", "populate"), (False, True), sorted({1, n_cores})):
        seconds = _seconds(n_bytes, how, huge, n_threads)
        if seconds is not None:
            found[f"{how}{'_huge' * huge}_x{n_threads}_s"] = seconds
    finish(metrics={"seconds": min(found.values()), **found})


def _seconds(n_bytes: int, how: str, huge: bool, n_threads: int) -> float | None:
    def write(begin: int) -> int:
        size = min(_BLOCK_BYTES, n_bytes - begin)
        if how == "populate":
            return int(_libc.madvise(address + begin, size, _MADV_POPULATE_WRITE))
        ctypes.memset(address + begin, 1, size)
        return 0

    with ThreadPoolExecutor(n_threads) as threads:
        begun = perf_counter()
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge:
            memory.madvise(mmap.MADV_HUGEPAGE)
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        failed = any(threads.map(write, range(0, n_bytes, _BLOCK_BYTES)))
        seconds = perf_counter() - begun
    del view
    memory.close()
    return None if failed else seconds


main(int(sys.argv[1]))
