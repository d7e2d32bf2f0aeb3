"""Files that are cold: their pages dropped from the page cache, and looked at with cachestat."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from fastload.storage.residency import resident_bytes


def resident(path: str | Path) -> int:
    """Bytes of a file that are cached; skips the test where the kernel does not tell."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        n_bytes = resident_bytes(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
    if n_bytes is None:
        pytest.skip("the kernel has no cachestat, or forbids it")
    return n_bytes


def make_cold(path: str | Path) -> None:
    """Drop a file's pages; skips the test where the file system keeps them (tmpfs)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    if resident(path) > os.path.getsize(path) // 10:
        pytest.skip("the file system keeps the pages of files that are dropped")


def threads() -> list[str]:
    """Names of the threads that fastload has running."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastload")]


def wait_for_no_threads(timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while threads() and time.monotonic() < end:
        time.sleep(0.005)
    assert threads() == []


def read_bytes() -> int:
    """Bytes that this process has caused to be fetched from storage."""
    with open("/proc/self/io") as io:
        return next(int(line.split()[1]) for line in io if line.startswith("read_bytes"))
