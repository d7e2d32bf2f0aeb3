"""Reading a folder while somebody saves to it: the old checkpoint or the new one, and never files of both.

A save makes its files count at one moment, but a reader opens them one after the other. So it notes before and after
which files there are, with inode, size and time; if nothing changed in between, all it read was there at once, and
if something did, it reads again. That needs no right to write and no lock, so that nobody waits, on any file system.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar

from fastload.errors import FastloadError, UnreadableFileError
from fastload.sources.journal import JOURNAL_NAME

__all__ = ["read_steadily"]

_Result = TypeVar("_Result")

# What a checkpoint is made of; what else is written to the folder is no reason to read again.
_RELEVANT = re.compile(rf"{re.escape(JOURNAL_NAME)}|(?!\.fastload-).*\.(safetensors|bin|json)", re.DOTALL)
_MAX_ATTEMPTS = 50


def read_steadily(path: str | os.PathLike[str], read: Callable[[], _Result]) -> _Result:
    """What ``read`` returns of a folder that did not change meanwhile. It is called again while it did.

    Args:
        path: the folder, or a file in it. What is no local path is read once.
        read: opens what it will need later too.

    Raises:
        UnreadableFileError: files of the folder were replaced each time.
        FastloadError: what ``read`` raised, if the folder had not changed.
    """
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder):
        folder = os.path.dirname(folder) or os.curdir
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


def _state(folder: str) -> frozenset[tuple[object, ...]]:
    """Every file that may be of a checkpoint, as it is now. Nothing where the folder cannot be read."""
    found: set[tuple[object, ...]] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _RELEVANT.fullmatch(entry.name):
                    try:
                        status = os.stat(entry.path)  # of what a link leads to
                    except OSError:
                        found.add((entry.name,))
                    else:
                        found.add((entry.name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    except OSError:
        pass
    return frozenset(found)
