"""What a process holds in memory, as the kernel tells it (proc(5))."""

from __future__ import annotations

import threading
from types import TracebackType

__all__ = ["PrivatePeak", "peak_resident_bytes", "private_bytes", "proportional_bytes"]


def private_bytes() -> int:
    """Resident anonymous memory of this process: heap and copied-on-write pages, not clean pages of mapped files."""
    return _status_bytes("RssAnon:")


def peak_resident_bytes() -> int:
    """The most resident memory that this process has had, pages of mapped files among it."""
    return _status_bytes("VmHWM:")


def proportional_bytes(pid: int) -> tuple[int, int]:
    """A process's proportional share (PSS) of anonymous memory, and of pages of files.

    A page that n processes have in memory counts as an nth of a page.
    """
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        fields = dict(line.split(":") for line in rollup if line.startswith("Pss_"))
    return int(fields["Pss_Anon"].split()[0]) * 1024, int(fields["Pss_File"].split()[0]) * 1024


class PrivatePeak:
    """Samples `private_bytes` on a thread while the block runs. ``peak_bytes`` is the largest sample.

    The kernel keeps no peak of anonymous memory alone, so a peak shorter than the interval can be missed.
    """

    def __init__(self, interval_s: float = 0.0005) -> None:
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PrivatePeak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, private_bytes())

    def _watch(self) -> None:
        while not self._done.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, private_bytes())


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not report {field}")
