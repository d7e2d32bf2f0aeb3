"""What this process has used so far, as the kernel counts it (proc(5)). None where it does not."""

from __future__ import annotations

import os
import time

__all__ = ["peak_bytes", "read_bytes", "seconds_since_start"]


def peak_bytes() -> int | None:
    """The most resident memory there has been, pages of mapped files among it."""
    kilobytes = _field("/proc/self/status", "VmHWM:")
    return None if kilobytes is None else kilobytes * 1024


def read_bytes() -> int | None:
    """Bytes fetched from disks for this process; what the page cache had is not among them."""
    return _field("/proc/self/io", "read_bytes:")


def seconds_since_start() -> float | None:
    """Age of this process, to a hundredth of a second."""
    try:
        with open("/proc/self/stat") as stat:
            # The command's name, in parentheses, may hold anything.
            fields = stat.read().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return None


def _field(path: str, name: str) -> int | None:
    try:
        with open(path) as file:
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1])
    except OSError:
        pass
    return None
