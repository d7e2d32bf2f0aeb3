"""Whether a file's bytes are in memory already, and what kind of file system they would come from.

Both decide how a file is best read: what is cached is used as it lies, what is cold is read ahead, and what lies behind
a network is never left to page faults. No torch here: these questions are asked before it is imported.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from functools import cache
from typing import NamedTuple

__all__ = ["FileSystem", "Residency", "file_system", "residency", "resident_bytes"]

# The same number on every architecture that Linux has had since 5.x, but for Alpha.
_SYS_CACHESTAT = 451
_PAGE = mmap.PAGESIZE
_MAP_FAILED = ctypes.c_void_p(-1).value
_N_SAMPLES = 64

# f_type of statfs(2), from linux/magic.h and the file systems' own headers. True: its bytes may come over a network.
_FILE_SYSTEMS: dict[int, tuple[str, bool]] = {
    0x6969: ("nfs", True),
    0xFF534D42: ("cifs", True),
    0xFE534D42: ("smb2", True),
    0x517B: ("smb", True),
    0x65735546: ("fuse", True),
    0x0BD00BD0: ("lustre", True),
    0x47504653: ("gpfs", True),
    0x00C36400: ("ceph", True),
    0x01021997: ("9p", True),
    0x5346414F: ("afs", True),
    0x6B414653: ("afs", True),
    0x73757245: ("coda", True),
    0x7461636F: ("ocfs2", True),
    0x19830326: ("beegfs", True),
    0x20030528: ("orangefs", True),
    0xAAD7AAEA: ("panfs", True),
    0x013111A8: ("ibrix", True),
    0xEF53: ("ext4", False),
    0x58465342: ("xfs", False),
    0x9123683E: ("btrfs", False),
    0xF2F52010: ("f2fs", False),
    0x2FC12FC1: ("zfs", False),
    0x01021994: ("tmpfs", False),
    0x858458F6: ("ramfs", False),
    0x794C7630: ("overlayfs", False),
    0x73717368: ("squashfs", False),
    0xE0F5E1E2: ("erofs", False),
}
_IN_MEMORY = ("tmpfs", "ramfs")


class FileSystem(NamedTuple):
    """What a file lies on.

    Attributes:
        name: such as ``"ext4"``; the type's number in hexadecimal where it has no name here, ``"unknown"`` where the
            platform does not tell.
        is_network: its bytes may come over a network. FUSE counts as one: a page fault there waits for a process,
            which asks a network more often than not.
    """

    name: str
    is_network: bool

    @property
    def is_memory(self) -> bool:
        """Its files are memory and cannot be cold."""
        return self.name in _IN_MEMORY


class Residency(NamedTuple):
    """How much of a range is in the page cache.

    Attributes:
        n_bytes: size of the range.
        n_resident_bytes: bytes of it that are cached; None where the kernel does not tell in any way.
        is_exact: counted by the kernel, and not estimated from samples.
    """

    n_bytes: int
    n_resident_bytes: int | None
    is_exact: bool

    @property
    def is_warm(self) -> bool:
        """All of it is known to be cached (of samples: every one)."""
        return self.n_resident_bytes is not None and self.n_resident_bytes >= self.n_bytes

    @property
    def n_cold_bytes(self) -> int:
        """Bytes still to be read; all of them where nothing is known."""
        return self.n_bytes - (self.n_resident_bytes or 0)


def residency(fd: int, offset_bytes: int = 0, n_bytes: int | None = None, *, exact: bool = True) -> Residency:
    """How much of a range of an open file is cached.

    First bytes spread over the range are looked at, in 0.1 ms whatever its size. Where one of them is not cached the
    kernel is asked for the whole (cachestat), which takes 25 ns a page: 12 ms for 2 GB in small pages, too much to
    be asked of a file that is warm.

    Args:
        fd: the file, open for reading.
        offset_bytes: where the range begins.
        n_bytes: its length; None for all that follows. A range that goes beyond the end of the file is cut there.
        exact: false to be content with the samples, for who asks only whether all of it is cached, or how much about.
    """
    left = max(0, os.fstat(fd).st_size - offset_bytes)
    n_bytes = left if n_bytes is None else min(n_bytes, left)
    name = file_system(fd).name
    if n_bytes == 0 or name in _IN_MEMORY:
        return Residency(n_bytes, n_bytes, True)
    share = _sampled_share(fd, offset_bytes, n_bytes)
    if share == 1 or (share is not None and not exact):
        return Residency(n_bytes, int(share * n_bytes), False)
    # A file of overlayfs has no pages: they belong to a file of the layer below, where cachestat does not look.
    counted = None if name == "overlayfs" else resident_bytes(fd, offset_bytes, n_bytes)
    if counted is not None:
        return Residency(n_bytes, counted, True)
    return Residency(n_bytes, None if share is None else int(share * n_bytes), False)


def resident_bytes(fd: int, offset_bytes: int, n_bytes: int) -> int | None:
    """Bytes of a range that are in the page cache, by cachestat(2); nothing is mapped.

    From 0.1 ms for 2 GB (large folios, as a file has that was just written) to 12 ms (single pages).

    None where the kernel (before 6.5, or not Linux) has no such call, or does not allow it: since 6.14 the caller must
    own the file or be allowed to write to it.
    """
    libc = _libc()
    if libc is None:
        return None
    if n_bytes <= 0:
        return 0
    # Whole pages are counted; those at the ends belong to the range in part.
    begin = offset_bytes // _PAGE * _PAGE
    asked, counts = _Range(begin, offset_bytes + n_bytes - begin), _Counts()
    if libc.syscall(_SYS_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(counts), 0) != 0:
        return None
    return min(int(counts.nr_cache) * _PAGE, n_bytes)


def file_system(file: str | int) -> FileSystem:
    """What a path or an open file lies on, by statfs(2). Raises nothing: what cannot be told is local."""
    libc = _libc()
    if libc is None:
        return FileSystem("unknown", False)
    buffer = (ctypes.c_long * 64)()
    if isinstance(file, int):
        failed = libc.fstatfs(file, ctypes.byref(buffer))
    else:
        failed = libc.statfs(os.fsencode(file), ctypes.byref(buffer))
    if failed:
        return FileSystem("unknown", False)
    # f_type comes first. It is a word on all 64-bit platforms but s390x, and its high bits may be a sign's.
    number = ctypes.c_uint32.from_buffer(buffer).value if sys.byteorder == "little" else buffer[0] & 0xFFFFFFFF
    return FileSystem(*_FILE_SYSTEMS.get(number, (hex(number), False)))


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = (
        ("nr_cache", ctypes.c_uint64),
        ("nr_dirty", ctypes.c_uint64),
        ("nr_writeback", ctypes.c_uint64),
        ("nr_evicted", ctypes.c_uint64),
        ("nr_recently_evicted", ctypes.c_uint64),
    )


@cache
def _libc() -> ctypes.CDLL | None:
    """libc with what is called here declared; None where this is not Linux."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.statfs.argtypes = [ctypes.c_char_p, pointer]
    libc.fstatfs.argtypes = [number, pointer]
    libc.syscall.restype = ctypes.c_long
    libc.syscall.argtypes = [ctypes.c_long, ctypes.c_uint, pointer, pointer, ctypes.c_uint]
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_int64]
    libc.munmap.argtypes = [pointer, size]
    libc.mincore.argtypes = [pointer, size, pointer]
    return libc


def _sampled_share(fd: int, offset_bytes: int, n_bytes: int) -> float | None:
    """Share of a range that is cached, by bytes spread over it. None if it cannot be told.

    Reading with RWF_NOWAIT (preadv2(2)) fails where it would have to wait, but has the kernel bring that page in, and
    some behind it. So each look is at other places: ranks that look at a cold file one after the other would find
    what the first one left. Where the file system does not have that call (overlayfs), mincore(2) tells.
    """
    n_samples = min(_N_SAMPLES, -(-n_bytes // _PAGE))
    shift = random.Random(os.urandom(8)).random()  # not the generator that belongs to the program
    places = [offset_bytes + int((i + shift) * n_bytes / n_samples) for i in range(n_samples)]
    n_cached = _n_readable_now(fd, places)
    if n_cached is None:
        n_cached = _n_in_core(fd, places)
    return None if n_cached is None else n_cached / n_samples


def _n_readable_now(fd: int, places: list[int]) -> int | None:
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is None:
        return None
    byte, n = [bytearray(1)], 0
    for at in places:
        try:
            n += os.preadv(fd, byte, at, nowait)
        except BlockingIOError:  # noqa: PERF203  a page that is not cached is what is looked for
            pass
        except OSError:
            return None
    return n


def _n_in_core(fd: int, places: list[int]) -> int | None:
    libc, status = _libc(), os.fstat(fd)
    # To others than its owner the kernel says that all of a file is cached. Who may write is not looked at.
    if libc is None or os.geteuid() not in (0, status.st_uid):
        return None
    base = libc.mmap(None, status.st_size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if base in (None, _MAP_FAILED):
        return None
    flag, n = ctypes.c_ubyte(), 0
    try:
        for at in places:
            if libc.mincore(base + at // _PAGE * _PAGE, _PAGE, ctypes.byref(flag)) != 0:
                return None
            n += flag.value & 1
    finally:
        libc.munmap(base, status.st_size)
    return n
