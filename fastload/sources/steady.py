"""Reading a folder while somebody saves to it: the old checkpoint or the new one, and never files of both.

A save makes its files count at one moment, but a reader opens them one after the other. So it notes before and after
which files there are, with inode, size and time; if nothing changed in between, all it read was there at once, and
if something did, it reads again. That needs no right to write and no lock, so that nobody waits, on any file system.

Where files are put and replaced by name, as saves do, the folder's own time changes with them. A folder that was left
alone for some seconds is therefore noted with the names and inodes that its listing has, and no file is asked for: a
thousand ranks that open a checkpoint of two hundred shards would otherwise ask half a million times.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

from fastload.errors import FastloadError, UnreadableFileError
from fastload.sources.journal import JOURNAL_NAME
from fastload.storage.residency import file_system

__all__ = ["read_steadily"]

_Result = TypeVar("_Result")

# What a checkpoint is made of; what else is written to the folder is no reason to read again.
_RELEVANT = re.compile(
    rf"{re.escape(JOURNAL_NAME)}|(?!\.fastload-).*\.(safetensors|bin|json|distcp|metadata)", re.DOTALL
)
_MAX_ATTEMPTS = 50
# Two changes within one tick of a file system's clock leave the folder with one time. Ticks are of 4 ms, of old file
# systems of a second; the rest is for the clock of a server that differs from this machine's.
_QUIET_NS = 10 * 10**9
# File systems whose folders have the time of the last change of their names; those of FUSE and others may not.
_KEEPS_TIME = frozenset({"btrfs", "ext4", "f2fs", "gpfs", "lustre", "nfs", "overlayfs", "tmpfs", "xfs", "zfs"})


def read_steadily(path: str | os.PathLike[str], read: Callable[[], _Result], *, subfolder: str = "") -> _Result:
    """What ``read`` returns of a folder that did not change meanwhile. It is called again while it did.

    Args:
        path: the folder, or a file in it. What is no local path is read once.
        read: opens what it will need later too.
        subfolder: the folder below it that is read.

    Raises:
        UnreadableFileError: files of the folder were replaced each time.
        FastloadError: what ``read`` raised, if the folder had not changed.
    """
    folder = _folder_of(os.path.expanduser(path), subfolder)
    if folder is None:
        return read()
    before = _state(folder)
    for _ in range(_MAX_ATTEMPTS):
        try:
            result = read()
        except FastloadError:
            after = _state(folder)
            if after == before:
                raise
        else:
            after = _state(folder)
            if after == before:
                return result
        before = after
    raise UnreadableFileError(
        "the files of the folder are replaced faster than they can be opened",
        file=folder,
        fix="wait until whoever writes there is done, then load again",
    )


def _folder_of(path: str, subfolder: str) -> str | None:
    """The folder that a path is about; None for the id of a repository."""
    if os.path.isdir(path):
        return os.path.join(path, subfolder) if subfolder else path
    folder, name = os.path.split(path)
    # A file that a save is about to put in its place is not there, but is named by the journal.
    is_file = os.path.lexists(path) or _RELEVANT.fullmatch(name) is not None
    return folder or os.curdir if is_file else None


def _state(folder: str) -> frozenset[tuple[object, ...]]:
    """Every file that may be of a checkpoint, as it is now. Nothing where the folder cannot be read."""
    found: set[tuple[object, ...]] = set()
    try:
        changed_ns = os.stat(folder).st_mtime_ns
        is_quiet = time.time_ns() - changed_ns > _QUIET_NS and file_system(folder).name in _KEEPS_TIME
        with os.scandir(folder) as entries:
            for entry in entries:
                if not _RELEVANT.fullmatch(entry.name):
                    continue
                if is_quiet and not entry.is_symlink():
                    found.add((entry.name, entry.inode(), changed_ns))
                    continue
                try:
                    status = os.stat(entry.path)  # of what a link leads to
                except OSError:
                    found.add((entry.name,))
                else:
                    found.add((entry.name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    except OSError:
        pass
    return frozenset(found)
