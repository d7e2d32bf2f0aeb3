"""The file a torch checkpoint is read from, and how the storages in it are asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from fastload.errors import TruncatedFileError, UnreadableFileError
from fastload.formats.specs import Region

__all__ = ["Source", "Storages", "open_source"]


class Source(NamedTuple):
    """A file, or a part of one, to be read: its descriptor, path, size in bytes, when it was modified, where it begins.

    Offsets count from the beginning of the part.
    """

    fd: int
    file: str
    n_bytes: int
    modified_ns: int
    begin_bytes: int = 0

    def read(self, offset_bytes: int, n_bytes: int) -> bytes:
        """Exactly `n_bytes`; TruncatedFileError where the file has fewer, UnreadableFileError where reading fails.

        Not a mapping: a file that is cut short while its directory is read would kill the process.
        """
        if offset_bytes < 0 or offset_bytes + n_bytes > self.n_bytes:
            raise self.truncated(f"{n_bytes} bytes at byte {offset_bytes}")
        pieces: list[bytes] = []
        while n_bytes > 0:
            try:
                piece = os.pread(self.fd, min(n_bytes, 1 << 30), self.begin_bytes + offset_bytes)
            except OSError as error:
                raise _unreadable(self.file, error) from error
            if not piece:
                raise self.truncated(f"{n_bytes} bytes at byte {offset_bytes}")
            if len(piece) == n_bytes and not pieces:
                return piece
            pieces.append(piece)
            offset_bytes += len(piece)
            n_bytes -= len(piece)
        return b"".join(pieces)

    def truncated(self, expected: str) -> TruncatedFileError:
        return TruncatedFileError(
            "the file ends before its contents do",
            file=self.file,
            expected=expected,
            found=f"a file of {self.n_bytes} bytes",
            fix="copy or download it again",
        )


class Storages(Protocol):
    """Where the storages of one file are."""

    def region(self, key: str, n_bytes: int, swap_bytes: int) -> Region:
        """The region of a storage.

        Args:
            key: the name the pickle gives it.
            n_bytes: the size the pickle gives it.
            swap_bytes: width of the units to be swapped if the file is of the other byte order.

        Raises:
            FormatError: there is no such storage, or it has another size.
        """


@contextmanager
def open_source(path: str) -> Iterator[Source]:
    """Open a regular file to read it; UnreadableFileError where that cannot be done."""
    file = os.fspath(path)
    try:
        # Looked at first, since opening a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise UnreadableFileError(
                "not a regular file", file=file, fix="name one weights file, not a folder or pipe"
            )
        fd = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except UnreadableFileError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    try:
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise _unreadable(file, error) from error
        yield Source(fd, file, status.st_size, status.st_mtime_ns)
    finally:
        os.close(fd)


def _unreadable(file: str, error: Exception) -> UnreadableFileError:
    reason = getattr(error, "strerror", None) or str(error)
    return UnreadableFileError(
        "the file cannot be read", file=file, found=reason, fix="check that it exists and that you may read it"
    )
