"""Writing a file so that a reader finds the old one or the new one, and never a part of either.

The bytes go to a temporary file in the same folder (a rename is atomic only within one file system), which
then takes the final name. The temporary file is opened with mode 0666, so that the kernel applies the umask:
``tempfile`` would leave 0600, and asking for the umask means setting it, for every thread of the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable

from fastload.errors import SaveError

__all__ = ["create_temporary", "rename", "save_error", "sync_file", "sync_folder", "write_bytes", "write_text"]

_COPY_BYTES = 8 << 20
# What mounts of object stores answer to a rename.
_CANNOT_RENAME = {errno.ENOSYS, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP}

_FIXES = {
    errno.ENOSPC: "free space on that file system, or save elsewhere",
    errno.EDQUOT: "the disk quota is used up: free space, or save elsewhere",
    errno.EACCES: "save to a folder that this user may write to",
    errno.EPERM: "save to a folder that this user may write to",
    errno.EROFS: "the file system is read-only: save elsewhere",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "a part of the path is a file: give a folder",
    errno.EISDIR: "a folder has the file's name: move it away, or save elsewhere",
}

# Not every file system can sync, and one that cannot is no reason not to save.
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})


def save_error(path: str | os.PathLike[str], error: OSError, doing: str = "be written") -> SaveError:
    """The SaveError for an OSError met while writing ``path``; ``doing`` completes "could not ..."."""
    return SaveError(
        f"{os.path.basename(path)} could not {doing}: {error.strerror or error}",
        file=path,
        fix=_FIXES.get(error.errno or 0, "see the reason above; files that were there before are unchanged"),
    )


def create_temporary(folder: str | os.PathLike[str]) -> tuple[int, str]:
    """Open a new file for writing in ``folder`` under a name nothing else has: (descriptor, path).

    The name begins with ``.fastload-`` and carries the process id, so that what a killed save left behind
    can be told from other files. Its mode is the umask's. Raises OSError.
    """
    while True:
        path = os.path.join(folder, f".fastload-{os.getpid()}-{secrets.token_hex(8)}.tmp")
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), path


def rename(temporary: str, path: str, sync: bool) -> None:
    """Give a complete file its name: by a rename, or by a copy where the file system has none.

    What was at ``path`` is deleted before a copy is made there and not overwritten, since somebody may have it mapped.
    A copy takes its time, in which the name stands for part of the file: in a checkpoint's folder the journal has
    readers use the temporary file until it is gone.

    Args:
        temporary: the file.
        path: its name to be.
        sync: have a copy on the disk before the temporary file goes.

    Raises:
        OSError: neither was possible.
    """
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME or not os.path.lexists(temporary):
            raise
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        _copy(temporary, path, sync)
        os.unlink(temporary)


def _copy(source: str, target: str, sync: bool) -> None:
    """Write a file anew, from its beginning to its end."""
    with open(source, "rb", buffering=0) as reading, open(target, "xb", buffering=0) as writing:
        buffer = memoryview(bytearray(_COPY_BYTES))
        while n_bytes := reading.readinto(buffer):
            done = 0
            while done < n_bytes:
                done += writing.write(buffer[done:n_bytes])
        if sync:
            sync_file(lambda: os.fsync(writing.fileno()))


def sync_file(sync: Callable[[], None]) -> None:
    """Call what syncs a file. That a file system cannot is no error; OSError for all others."""
    try:
        sync()
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Have the renames in ``folder`` survive a power failure. That a file system cannot is no error.

    Nor is that the folder may be written to but not read. Raises OSError where the disk fails.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike[str], data: bytes | bytearray | memoryview, *, sync: bool = True) -> None:
    """Put ``data`` at ``path``, whole or not at all.

    Args:
        path: the file; its folder must exist. A symbolic link is replaced, its target left alone.
        data: all of its bytes.
        sync: have the bytes on the disk before the name points to them, so that a power failure leaves no
            empty file.

    Raises:
        SaveError: the operating system refused; what is at ``path`` is what was there, or all of ``data``.
    """
    folder = os.path.dirname(os.fspath(path)) or os.curdir
    try:
        descriptor, temporary = create_temporary(folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(descriptor)
            rename(temporary, os.fspath(path), sync)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        if sync:
            sync_folder(folder)
    except OSError as error:
        raise save_error(path, error) from error


def write_text(path: str | os.PathLike[str], text: str, *, sync: bool = True) -> None:
    """``write_bytes`` of ``text`` in UTF-8, line ends as they are."""
    write_bytes(path, text.encode(), sync=sync)
