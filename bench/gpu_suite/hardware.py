"""What the machine can give: the link to the device, the page cache, the storage. Rates in GB/s, decimal."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from suite.checkpoints import warm_up, weight_files
from suite.cold import cached_share, drop_cached

from gpu_suite.device import Device
from gpu_suite.schedule import NotHereError

if TYPE_CHECKING:
    import torch

__all__ = ["drop", "flush", "link_rates", "page_cache_rates", "storage_rates"]

_SLOT_BYTES = 64 << 20
_SMALL_SLOT_BYTES = 1 << 20
_N_PASSES = 3
_PAGE_CACHE_S = 0.7
_STORAGE_S = 1.2
_BEST_STORAGE_S = 6.0
_ALIGNMENT = 4096
_CACHED = 0.99
_N_THREADS = (1, 2, 4, 8, 16)
_STORAGE_BLOCK_BYTES = 8 << 20


def link_rates(device: Device, *, small: bool) -> dict[str, Any]:
    """Host to device in slots, from pinned and from pageable memory; the best of three passes. Seconds to pin a GB.

    On the CPU there is no link: what is measured is a copy from memory to memory, and ``is_host_copy`` says so.
    """
    import torch

    slot_bytes, n_slots = (_SMALL_SLOT_BYTES, 4) if small else (_SLOT_BYTES, 16)
    begun = perf_counter()
    pinned = _slots(n_slots, slot_bytes, pinned=device.is_gpu)
    pin_s = perf_counter() - begun
    target = torch.empty(n_slots, slot_bytes, dtype=torch.uint8, device=device.name)
    pageable = _slots(n_slots, slot_bytes, pinned=False)
    content = torch.randint(256, (slot_bytes,), dtype=torch.uint8)
    for slots in (pinned, pageable):
        slots.copy_(content.expand_as(slots))
    found: dict[str, Any] = {
        "is_host_copy": not device.is_gpu,
        "pinned_gb_per_s": _copy_rate(pinned, target, device),
        "pageable_gb_per_s": _copy_rate(pageable, target, device),
    }
    if device.is_gpu:
        found["pin_s_per_gb"] = pin_s / (n_slots * slot_bytes) * 1e9
    return found


def page_cache_rates(folder: Path, device: Device, *, small: bool) -> dict[str, Any]:
    """Parallel preadv of cached files into slots that are in memory, pinned and pageable, by number of threads.

    What others on the machine pushed out of the page cache is read into it first.
    """
    files = weight_files(folder)
    if _least_cached(files) < _CACHED:
        warm_up(folder)
    if (share := _least_cached(files)) < _CACHED:
        raise NotHereError(f"the page cache has only {share:.0%} of the files")
    slot_bytes = _SMALL_SLOT_BYTES if small else _SLOT_BYTES // 4
    counts = [n for n in _N_THREADS if n <= 2 * len(os.sched_getaffinity(0))]
    found: dict[str, Any] = {}
    for kind in ("pinned", "pageable") if device.is_gpu else ("pageable",):
        slots = _slots(counts[-1], slot_bytes, pinned=kind == "pinned")
        found[f"{kind}_gb_per_s"] = {
            str(n): _read_rate(files, [memoryview(slot.numpy()) for slot in slots[:n]], 0, _PAGE_CACHE_S)
            for n in counts
        }
    found["best_gb_per_s"] = max(rate for rates in found.values() for rate in rates.values())
    return found


def storage_rates(files: Sequence[Path]) -> dict[str, Any]:
    """Files that are dropped from the page cache before each reading: buffered and O_DIRECT, by number of threads.

    Each way has its time; then the best of them has more of it, and that is the rate that loads are held against.
    """
    drop(files)
    ways = [(kind, flags, n) for kind, flags in (("buffered", 0), ("direct", os.O_DIRECT)) for n in _N_THREADS]
    rates: dict[tuple[str, int, int], float] = {}
    for way in ways:
        rate = _storage_rate(files, way[1], way[2], _STORAGE_S)
        if rate is not None:
            rates[way] = rate
    best = max(rates, key=lambda way: rates[way])
    whole = _storage_rate(files, best[1], best[2], _BEST_STORAGE_S)
    assert whole is not None
    found: dict[str, Any] = {"buffered_gb_per_s": {}, "direct_gb_per_s": {}}
    for (kind, _, n), rate in rates.items():
        found[f"{kind}_gb_per_s"][str(n)] = rate
    return found | {"best": f"{best[0]} x {best[2]}", "best_gb_per_s": whole}


def flush(timeout_s: float) -> dict[str, Any]:
    """Have what was written on the storage, so that writes are not measured along with reads.

    ``is_flushed`` is false where it took longer than it may; the kernel goes on with it.
    """
    begun = perf_counter()
    thread = threading.Thread(target=os.sync, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return {"is_flushed": not thread.is_alive(), "flush_s": perf_counter() - begun}


def _least_cached(files: Sequence[Path]) -> float:
    return min(cached_share(file) for file in files)


def drop(files: Sequence[Path]) -> None:
    """As `drop_cached`; NotHereError where this machine does not do it, since what came then would not be cold."""
    try:
        drop_cached(files)
    except OSError as error:
        raise NotHereError(f"files cannot be dropped from the page cache here: {error}") from error


def _slots(n: int, slot_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Host memory whose pages are there, aligned as O_DIRECT wants it: uint8 of (n, slot_bytes)."""
    import torch

    if (
        pinned
    ):  # in whole pages, all of them there; torch rounds sizes up to powers of two, so not a byte more is asked for
        return torch.empty(n, slot_bytes, dtype=torch.uint8, pin_memory=True)
    memory = torch.empty(n * slot_bytes + _ALIGNMENT, dtype=torch.uint8)
    memory.fill_(1)
    begin = -memory.data_ptr() % _ALIGNMENT
    return memory[begin : begin + n * slot_bytes].view(n, slot_bytes)


def _copy_rate(slots: torch.Tensor, target: torch.Tensor, device: Device) -> float:
    seconds = []
    for _ in range(_N_PASSES + 1):  # the first warms up
        device.synchronise()
        begun = perf_counter()
        for source, destination in zip(slots, target, strict=True):
            destination.copy_(source, non_blocking=True)
        device.synchronise()
        seconds.append(perf_counter() - begun)
    return slots.numel() / min(seconds[1:]) / 1e9


def _storage_rate(files: Sequence[Path], flags: int, n_threads: int, most_s: float) -> float | None:
    """None where the file system cannot be read in this way."""
    drop(files)
    slots = _slots(n_threads, _STORAGE_BLOCK_BYTES, pinned=False)
    try:
        return _read_rate(files, [memoryview(slot.numpy()) for slot in slots], flags, most_s)
    except OSError:
        return None


def _read_rate(files: Sequence[Path], slots: Sequence[memoryview], flags: int, most_s: float) -> float:
    """Read files into slots, a thread each, until all is read or the time is up: GB/s."""
    slot_bytes = len(slots[0])
    descriptors = [os.open(file, os.O_RDONLY | flags) for file in files]
    sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
    blocks = [
        (descriptor, begin)
        for descriptor, size in zip(descriptors, sizes, strict=True)
        for begin in range(0, size, slot_bytes)
    ]
    begun = perf_counter()
    end = begun + most_s

    def read(thread: int) -> int:
        n_bytes = 0
        for descriptor, begin in blocks[thread :: len(slots)]:
            if perf_counter() > end:
                break
            n_bytes += os.preadv(descriptor, [slots[thread]], begin)
        return n_bytes

    try:
        n_bytes = _in_threads(read, len(slots))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return n_bytes / (perf_counter() - begun) / 1e9


def _in_threads(work: Callable[[int], int], n_threads: int) -> int:
    with ThreadPoolExecutor(n_threads) as threads:
        return sum(threads.map(work, range(n_threads)))
