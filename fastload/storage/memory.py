"""How much memory this process holds for itself, and how much it may still have."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

__all__ = ["available_bytes", "private_bytes"]

_V1_MOUNTS: tuple[str, ...] = ("/sys/fs/cgroup/memory",)
_V2_MOUNTS: tuple[str, ...] = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")


def private_bytes() -> int | None:
    """Resident anonymous memory (heap, copied-on-write pages) in bytes; None where the kernel does not say.

    Clean pages of a mapped file do not count: they belong to the page cache, are shared between processes, and the
    kernel can take them back. Source: proc(5), whose statm has the pages of RssAnon as the difference of two numbers
    and is read in a fifth of the time of status.
    """
    try:
        with open("/proc/self/statm", "rb") as sizes:
            _, n_resident, n_of_files, *_ = sizes.read().split()
    except OSError:
        return None
    return (int(n_resident) - int(n_of_files)) * mmap.PAGESIZE


def available_bytes() -> int | None:
    """Memory that can be used without pushing out what others use, in bytes; None where the platform does not say.

    The smaller of what the machine has (MemAvailable of proc(5)) and what the control groups of this process, and
    those around them, leave it: their limit less their use, of which file pages not lately used can be taken back.
    """
    in_kb = _numbers("/proc/meminfo").get("MemAvailable:")
    machine = [] if in_kb is None else [in_kb * 1024]
    return min([*machine, *_left_by_groups()], default=None)


def _left_by_groups() -> Iterator[int]:
    """Bytes that each control group above this process leaves, for versions 1 and 2 of cgroups(7)."""
    try:
        with open("/proc/self/cgroup") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            mounts, names = _V2_MOUNTS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mounts, names = _V1_MOUNTS, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            # Within a container the path may be the host's, and only the mount's own folder is there.
            for n_parts in range(len(parts), -1, -1):
                left = _left_by_group(os.path.join(mount, *parts[:n_parts]), *names)
                if left is not None:
                    yield left


def _left_by_group(folder: str, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        with open(os.path.join(folder, limit)) as file:
            most = int(file.read())  # "max" is no number
        with open(os.path.join(folder, usage)) as file:
            used = int(file.read())
    except (OSError, ValueError):
        return None
    return max(0, most - used + _numbers(os.path.join(folder, "memory.stat")).get(reclaimable, 0))


def _numbers(path: str) -> dict[str, int]:
    """The lines "name number ..." of a file of the kernel's; none if it cannot be read."""
    found = {}
    try:
        with open(path) as file:
            for line in file:
                words = line.split(None, 2)
                if len(words) > 1 and words[1].isdigit():
                    found[words[0]] = int(words[1])
    except OSError:
        pass
    return found
