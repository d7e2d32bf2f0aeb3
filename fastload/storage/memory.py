"""How much memory this process holds for itself."""

from __future__ import annotations

__all__ = ["private_bytes"]


def private_bytes() -> int | None:
    """Resident anonymous memory (heap, copied-on-write pages) in bytes; None where the kernel does not say.

    Clean pages of a mapped file do not count: they belong to the page cache, are shared between processes, and the
    kernel can take them back. Source: RssAnon of proc(5).
    """
    try:
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
