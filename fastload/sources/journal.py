"""The note a save leaves while it renames its files, so that a save that was killed there is a whole one.

A save writes every file of the new checkpoint under a temporary name first. Several renames are not atomic
together, so between the first and the last the folder would hold a part of each checkpoint. Before the first
rename the save therefore writes this journal, atomically; after the last it deletes it. Who finds a journal
knows that the new checkpoint is complete, and reads each file under the temporary name if that is still
there, and under the final one otherwise. This is the write-ahead log of databases, for a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastload.errors import FormatError, UnreadableFileError

__all__ = [
    "JOURNAL_NAME",
    "FolderView",
    "Journal",
    "apply_view",
    "encode_journal",
    "read_journal",
    "view_folder",
]

JOURNAL_NAME = ".fastload-commit.json"

_VERSION = 1
_MAX_JOURNAL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Journal:
    """What a save was about to do when it wrote this.

    Attributes:
        renames: final name -> temporary name, of every file of the new checkpoint.
        superseded: weight files and indexes of the old checkpoint that are no part of the new one.
    """

    renames: Mapping[str, str] = field(default_factory=dict)
    superseded: tuple[str, ...] = ()


def encode_journal(journal: Journal) -> str:
    """The journal file's text, for ``storage.atomic.write_text`` once all temporary files are complete."""
    content = {
        "version": _VERSION,
        "renames": dict(journal.renames),
        "superseded": list(journal.superseded),
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def read_journal(folder: str | os.PathLike[str]) -> Journal | None:
    """The journal of an unfinished save in ``folder``; None where there is none, as nearly always.

    Raises:
        FormatError: it is damaged, of a later fastload, or names files outside the folder.
        UnreadableFileError: the operating system refused to read it.
    """
    path = os.path.join(folder, JOURNAL_NAME)
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_JOURNAL_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        enterable = os.access(folder, os.X_OK)
        what = "the journal of an unfinished save" if enterable else "the folder"
        raise UnreadableFileError(
            f"{what} could not be read: {error.strerror or error}",
            file=path if enterable else folder,
            fix="give this user the right to read it, and to enter the folder",
        ) from error
    if not text:
        # Where renames are refused the journal is a copy, and a copy begins empty: no file has its new name yet.
        return None
    try:
        content = json.loads(text) if len(text) <= _MAX_JOURNAL_BYTES else None
    except (ValueError, RecursionError):
        content = None
    return _journal(content, path)


def _journal(content: Any, path: str) -> Journal:
    if not isinstance(content, dict) or not isinstance(content.get("version"), int):
        raise _damaged(path, "a JSON object with a version", "something else")
    if content["version"] != _VERSION:
        raise FormatError(
            "the save that was interrupted here was made by another version of fastload",
            file=path,
            expected=f"version {_VERSION}",
            found=f"version {content['version']}",
            fix="load this folder with the fastload that saved it, or upgrade fastload",
        )
    renames, superseded = content.get("renames"), content.get("superseded", [])
    if not isinstance(renames, dict) or not isinstance(superseded, list):
        raise _damaged(path, "an object 'renames' and a list 'superseded'", "other fields")
    for name in [*renames, *renames.values(), *superseded]:
        if not _is_plain_name(name):
            raise _damaged(path, "plain names of files in this folder", ascii(name)[:100])
    if len(set(renames.values())) != len(renames):
        raise _damaged(path, "a temporary file for each file", "one that stands for two")
    return Journal(renames, tuple(superseded))


def _damaged(path: str, expected: str, found: str) -> FormatError:
    return FormatError(
        "the journal of an unfinished save is damaged",
        file=path,
        expected=expected,
        found=found,
        fix="save the checkpoint again; or delete this file if the folder is known to be whole",
    )


def _is_plain_name(name: object) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..", JOURNAL_NAME) or set(name) & set("/\\\0"):
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class FolderView:
    """A folder as its newest complete save left it, or would have.

    Attributes:
        folder: its path.
        journal: that of a save that did not come to its end; None for an ordinary folder.
    """

    folder: str
    journal: Journal | None

    def path(self, name: str) -> str:
        """Where the file of this name lies now. It need not exist."""
        if self.journal is not None and name in self.journal.renames:
            temporary = os.path.join(self.folder, self.journal.renames[name])
            if os.path.lexists(temporary):
                return temporary
        return os.path.join(self.folder, name)

    def names(self) -> set[str]:
        """Names of what is in the folder. Raises OSError."""
        present = set(os.listdir(self.folder))
        if self.journal is None:
            return present
        renames = self.journal.renames
        complete = {final for final, temporary in renames.items() if final in present or temporary in present}
        hidden = set(renames.values()) | (set(self.journal.superseded) - set(renames)) | {JOURNAL_NAME}
        return (present - hidden) | complete


def view_folder(folder: str | os.PathLike[str]) -> FolderView:
    """The folder with its journal, if it has one, taken into account. Raises as ``read_journal`` does."""
    return FolderView(os.fspath(folder), read_journal(folder))


def apply_view(folder: str | os.PathLike[str], name: str) -> str:
    """The path under which the file ``name`` of the checkpoint in ``folder`` is to be read."""
    return view_folder(folder).path(name)
