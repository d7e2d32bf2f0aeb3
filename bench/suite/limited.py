"""Processes that may use only so much memory: control groups, version 1 or 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["limited", "reason_for_no_limit"]

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


def reason_for_no_limit() -> str:
    """Why this process cannot make a group with a limit; "" if it can."""
    try:
        with limited(1 << 40):
            return ""
    except OSError as error:
        return f"no control group with a memory limit can be made here: {error}"


@contextmanager
def limited(n_bytes: int) -> Iterator[Path]:
    """This process, and file pages that it reads, within a limit. Gives the group's folder.

    Memory that was used before is counted where it was.
    """
    is_v1 = (_V1 / "memory.limit_in_bytes").exists()
    parent = _V1 if is_v1 else _V2
    group = parent / f"fastload-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(n_bytes))
        swap = group / ("memory.swappiness" if is_v1 else "memory.swap.max")
        if swap.exists():
            swap.write_text("0")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield group
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
