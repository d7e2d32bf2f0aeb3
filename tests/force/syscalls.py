"""Faults at the border between a program and the kernel: a system call killed at, refused, or cut short.

A small strace. The program runs in a forked process; a seccomp filter stops it at the system calls of interest, and
ptrace lets this process look at each one that concerns a folder and decide what becomes of it. What runs is the code
under test as it is, whichever function of whichever library makes the call, in whichever thread. Linux on x86-64.

Numbers and structures: ``<asm/unistd_64.h>``, ``<sys/user.h>``, ptrace(2), seccomp(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["CHANGES", "KILL", "READS", "Call", "Fault", "cut", "refusal", "run_traced", "why_not"]


class _Form(NamedTuple):
    """Where a call's arguments are: descriptors; paths, each with the argument of the folder it starts from or None."""

    number: int
    descriptors: tuple[int, ...] = ()
    paths: tuple[tuple[int | None, int], ...] = ()


# What can change a file or a folder. Of the calls that open, those for reading only are passed over.
CHANGES = {
    "write": _Form(1, (0,)),
    "pwrite64": _Form(18, (0,)),
    "writev": _Form(20, (0,)),
    "pwritev": _Form(296, (0,)),
    "pwritev2": _Form(328, (0,)),
    "sendfile": _Form(40, (0,)),
    "copy_file_range": _Form(326, (2,)),
    "open": _Form(2, (), ((None, 0),)),
    "creat": _Form(85, (), ((None, 0),)),
    "openat": _Form(257, (), ((0, 1),)),
    "openat2": _Form(437, (), ((0, 1),)),
    "close": _Form(3, (0,)),
    "fsync": _Form(74, (0,)),
    "fdatasync": _Form(75, (0,)),
    "sync_file_range": _Form(277, (0,)),
    "syncfs": _Form(306, (0,)),
    "truncate": _Form(76, (), ((None, 0),)),
    "ftruncate": _Form(77, (0,)),
    "fallocate": _Form(285, (0,)),
    "ioctl": _Form(16, (0,)),
    "rename": _Form(82, (), ((None, 0), (None, 1))),
    "renameat": _Form(264, (), ((0, 1), (2, 3))),
    "renameat2": _Form(316, (), ((0, 1), (2, 3))),
    "mkdir": _Form(83, (), ((None, 0),)),
    "mkdirat": _Form(258, (), ((0, 1),)),
    "rmdir": _Form(84, (), ((None, 0),)),
    "unlink": _Form(87, (), ((None, 0),)),
    "unlinkat": _Form(263, (), ((0, 1),)),
    "link": _Form(86, (), ((None, 0), (None, 1))),
    "linkat": _Form(265, (), ((0, 1), (2, 3))),
    "symlink": _Form(88, (), ((None, 1),)),
    "symlinkat": _Form(266, (), ((1, 2),)),
    "chmod": _Form(90, (), ((None, 0),)),
    "fchmod": _Form(91, (0,)),
    "fchmodat": _Form(268, (), ((0, 1),)),
    "chown": _Form(92, (), ((None, 0),)),
    "fchown": _Form(93, (0,)),
    "fchownat": _Form(260, (), ((0, 1),)),
    "utimensat": _Form(280, (), ((0, 1),)),
    "setxattr": _Form(188, (), ((None, 0),)),
    "fsetxattr": _Form(190, (0,)),
}
# What reading is made of.
READS = {
    "read": _Form(0, (0,)),
    "pread64": _Form(17, (0,)),
    "readv": _Form(19, (0,)),
    "preadv": _Form(295, (0,)),
    "preadv2": _Form(327, (0,)),
    "mmap": _Form(9, (4,)),
    "open": _Form(2, (), ((None, 0),)),
    "openat": _Form(257, (), ((0, 1),)),
    "openat2": _Form(437, (), ((0, 1),)),
    "stat": _Form(4, (), ((None, 0),)),
    "lstat": _Form(6, (), ((None, 0),)),
    "fstat": _Form(5, (0,)),
    "newfstatat": _Form(262, (0,), ((0, 1),)),
    "statx": _Form(332, (0,), ((0, 1),)),
    "getdents64": _Form(217, (0,)),
    "access": _Form(21, (), ((None, 0),)),
    "faccessat": _Form(269, (), ((0, 1),)),
    "faccessat2": _Form(439, (), ((0, 1),)),
    "readlink": _Form(89, (), ((None, 0),)),
    "readlinkat": _Form(267, (), ((0, 1),)),
    "lseek": _Form(8, (0,)),
    "fadvise64": _Form(221, (0,)),
    "cachestat": _Form(451, (0,)),
    "fstatfs": _Form(138, (0,)),
    "statfs": _Form(137, (), ((None, 0),)),
}
_FLAGS = {"open": 1, "openat": 2}
_VECTORS = {"writev", "pwritev", "pwritev2", "readv", "preadv", "preadv2"}
_LENGTHS = {"write", "pwrite64", "read", "pread64"}


class Call(NamedTuple):
    """A system call that concerns the folder: its name and the paths in it, relative to the folder."""

    name: str
    paths: tuple[str, ...]


class Fault(NamedTuple):
    """What becomes of a call: it is refused, or does only a part of what it could. With neither, the process dies."""

    errno: int | None = None
    n_bytes: int | None = None


KILL = Fault()


def refusal(number: int) -> Fault:
    """The call fails with this error. 0: it is not made, and succeeds."""
    return Fault(errno=number)


def cut(n_bytes: int) -> Fault:
    """A call that reads or writes does so with this many bytes at most. Others are left alone."""
    return Fault(n_bytes=n_bytes)


# ---- ptrace ----

_TRACEME, _CONT, _GETREGS, _SETREGS, _SETOPTIONS = 0, 7, 12, 13, 0x4200
_OPTIONS = 0x2 | 0x4 | 0x8 | 0x80 | 0x100000  # fork, vfork, clone, seccomp; the traced process ends with this one
_SECCOMP_STOP = signal.SIGTRAP | 7 << 8
_WALL = 0x40000000
_N_REGISTERS = 27
_ARGUMENTS = (14, 13, 12, 7, 9, 8)  # rdi, rsi, rdx, r10, r8, r9
_RAX, _RDX, _ORIG_RAX = 10, 12, 15
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_Registers = ctypes.c_uint64 * _N_REGISTERS


def _ptrace(request: int, pid: int, data: object = None) -> None:
    if _libc.ptrace(request, pid, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def _watch_calls(numbers: list[int]) -> None:
    """Have this process stop at these calls from now on, for the process that traces it."""
    trace, allow = 0x7FF00000, 0x7FFF0000
    program = [struct.pack("<HBBI", 0x20, 0, 0, 0)]  # load the number of the call
    for at, number in enumerate(numbers):
        program.append(struct.pack("<HBBI", 0x15, len(numbers) - at, 0, number))  # if equal, jump to the last line
    program += [struct.pack("<HBBI", 0x06, 0, 0, value) for value in (allow, trace)]
    code = ctypes.create_string_buffer(b"".join(program))
    filters = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code)))
    for arguments in ((38, 1, 0, 0, 0), (22, 2, filters, 0, 0)):  # no new privileges; seccomp by a filter
        if _libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


def why_not() -> str | None:
    """Why calls cannot be traced here; None if they can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"system calls are traced on Linux and x86-64 only, and this is {sys.platform} {platform.machine()}"
    try:
        calls, status = run_traced(lambda: os.mkdir("/nowhere/at/all"), "/nowhere", CHANGES, lambda *_: refusal(0))
    except OSError as error:
        return f"this system lets no process be traced: {error}"
    return None if (len(calls), status) == (1, 0) else "this system lets no system call be changed"


def run_traced(
    action: Callable[[], object], folder: str, forms: dict[str, _Form], decide: Callable[[int, Call], Fault | None]
) -> tuple[list[Call], int]:
    """Do something in a forked process, with faults.

    Args:
        action: what to do.
        folder: calls that concern neither it nor what is in it are left alone.
        forms: the calls to look at, ``CHANGES`` or ``READS``.
        decide: given how many calls there were before and the call, says what is to become of it; None for nothing.

    Returns:
        The calls, and how the process ended: its exit status (0 if nothing was raised), or minus the signal.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            _watch_calls([form.number for form in forms.values()])
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, _WALL)
    if not os.WIFSTOPPED(status):
        raise OSError(errno.EPERM, "the forked process could not be traced")
    _ptrace(_SETOPTIONS, pid, _OPTIONS)
    _ptrace(_CONT, pid)
    return _follow(pid, folder, {form.number: (name, form) for name, form in forms.items()}, decide)


def _follow(
    pid: int, folder: str, forms: dict[int, tuple[str, _Form]], decide: Callable[[int, Call], Fault | None]
) -> tuple[list[Call], int]:
    calls: list[Call] = []
    while True:
        thread, status = os.waitpid(-1, _WALL)
        if not os.WIFSTOPPED(status):
            if thread == pid:
                return calls, os.waitstatus_to_exitcode(status)
            continue
        delivered = 0
        if status >> 8 == _SECCOMP_STOP:
            registers = _Registers()
            _ptrace(_GETREGS, thread, registers)
            call = _call(thread, folder, registers, *forms[registers[_ORIG_RAX]])
            if call is not None:
                fault = decide(len(calls), call)
                calls.append(call)
                if fault == KILL:
                    os.kill(pid, signal.SIGKILL)
                    continue
                if fault is not None:
                    _apply(fault, call, thread, registers)
        elif os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP):
            delivered = os.WSTOPSIG(status)
        try:
            _ptrace(_CONT, thread, delivered)
        except ProcessLookupError:  # it was killed meanwhile
            continue


def _call(thread: int, folder: str, registers: ctypes.Array[ctypes.c_uint64], name: str, form: _Form) -> Call | None:
    arguments = [registers[at] for at in _ARGUMENTS]
    if name == "ioctl" and arguments[1] != 0x40049409:  # FICLONE
        return None
    found = [_descriptor_path(thread, arguments[at]) for at in form.descriptors]
    for start, at in form.paths:
        path = _text(thread, arguments[at])
        base = _descriptor_path(thread, arguments[start]) if start is not None else ""
        found.append(os.path.join(base or f"/proc/{thread}/cwd", path) if path else base)
    inside = [path for path in found if path == folder or path.startswith(folder + "/")]
    if not inside:
        return None
    if name in _FLAGS and form is CHANGES[name]:
        if not arguments[_FLAGS[name]] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return None
    elif name == "close" and os.path.isdir(inside[0]):
        return None
    return Call(name, tuple(os.path.relpath(path, folder) for path in inside))


def _descriptor_path(thread: int, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{thread}/fd/{descriptor}").removesuffix(" (deleted)")
    except OSError:  # none, or the working directory (AT_FDCWD)
        return ""


def _text(thread: int, address: int) -> str:
    if not address:
        return ""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        data = b""
        while b"\0" not in data:
            # Not beyond the page: the next one may not be there.
            data += memory.read(4096 - (address + len(data)) % 4096)
    return os.fsdecode(data.split(b"\0", 1)[0])


def _apply(fault: Fault, call: Call, thread: int, registers: ctypes.Array[ctypes.c_uint64]) -> None:
    if fault.errno is not None:
        registers[_ORIG_RAX] = 2**64 - 1  # no such call: what is in rax is the result
        registers[_RAX] = (2**64 - fault.errno) % 2**64
    elif fault.n_bytes is not None and call.name in _LENGTHS:
        registers[_RDX] = min(registers[_RDX], fault.n_bytes)
    elif fault.n_bytes is not None and call.name in _VECTORS:
        registers[_RDX] = _cut_vector(thread, registers[_ARGUMENTS[1]], registers[_RDX], fault.n_bytes)
    _ptrace(_SETREGS, thread, registers)


def _cut_vector(thread: int, address: int, n_buffers: int, n_bytes: int) -> int:
    """Shorten a list of (address, length) to so many bytes. Returns how many buffers are left of it."""
    with open(f"/proc/{thread}/mem", "r+b", buffering=0) as memory:
        for at in range(n_buffers):
            memory.seek(address + 16 * at + 8)
            length = int.from_bytes(memory.read(8), "little")
            if length >= n_bytes:
                memory.seek(address + 16 * at + 8)
                memory.write(n_bytes.to_bytes(8, "little"))
                return at + 1
            n_bytes -= length
    return n_buffers


if __name__ == "__main__":
    print(why_not() or "")
