"""Replacing the checkpoint in a folder by another, at one moment.

Every file is written under a temporary name. When all are complete the journal is written, and that is the moment:
before it the folder is the old checkpoint, from it on the new one (see ``fastload.sources.journal``). Then the files
take their names (weights, index, config last), those of the old checkpoint that are not replaced go, and so does the
journal. A process that dies on the way leaves either temporary files, which the next save sweeps, or a journal, which
the next save carries out; readers need wait for neither.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType

from fastload.errors import FormatError, SaveError, UnreadableFileError
from fastload.options import Durability
from fastload.sources.journal import JOURNAL_NAME, Journal, encode_journal, read_journal
from fastload.storage.atomic import rename, save_error, sync_file, sync_folder
from fastload.storage.writing import FileWriter

__all__ = ["FolderCommit"]

_TEMPORARY_PREFIX = ".fastload-tmp-"
# A journal found in a folder may be anybody's: these are the only files it can have removed.
_WEIGHTS = re.compile(r"(pytorch_)?model([.-].*)?\.(safetensors|bin)(\.index(\..+)?\.json)?", re.DOTALL)


class FolderCommit:
    """A save into a folder that happens wholly or not at all.

    As a context manager it makes the folder, carries out what a killed save left, and keeps other saves of
    this machine waiting. Left without ``commit``, it removes what was written.

    Args:
        folder: made if need be, with its parents.
        durability: what to wait for (see ``fastload.options.Durability``).
        progress: called with the number of bytes whenever some were written.

    Raises:
        SaveError: from every method, where the operating system refuses.
    """

    def __init__(
        self, folder: str, *, durability: Durability = "full", progress: Callable[[int], None] | None = None
    ) -> None:
        self.folder = folder
        self._syncs_files = durability != "none"
        self._syncs_folder = durability == "full"
        self._progress = progress
        self._temporaries: dict[str, str] = {}
        self._is_renaming = False
        self._parents: list[str] = []
        self._lock: int | None = None

    def __enter__(self) -> FolderCommit:
        self._parents = _make_folder(self.folder)
        self._lock = _lock_folder(self.folder)
        try:
            self._recover()
        except BaseException:
            _unlock(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if not self._is_renaming:
                self._withdraw()
        finally:
            _unlock(self._lock)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[FileWriter]:
        """A new file of the checkpoint to write, complete when the context is left."""
        with self._writer(name, self._create(name)) as writer:
            yield writer

    def reserve(self, name: str, n_bytes: int) -> str:
        """A new file of the checkpoint for several processes to write: its temporary name in the folder.

        It is complete when ``finish`` was left, and all of them have written, synced and closed it before.
        """
        descriptor = self._create(name)
        try:
            os.ftruncate(descriptor, n_bytes)
        except OSError as error:
            raise save_error(os.path.join(self.folder, name), error) from error
        finally:
            os.close(descriptor)
        return self._temporaries[name]

    @contextlib.contextmanager
    def finish(self, name: str) -> Iterator[FileWriter]:
        """A file that was reserved, to write again from its beginning."""
        try:
            descriptor = os.open(self._path_of_temporary(name), os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise save_error(os.path.join(self.folder, name), error) from error
        with self._writer(name, descriptor) as writer:
            yield writer

    def _create(self, name: str) -> int:
        self._temporaries[name] = f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}-{name}"
        # 0666 less the umask, as for any file; tempfile would make it 0600.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(self._path_of_temporary(name), flags, 0o666)
        except OSError as error:
            raise save_error(os.path.join(self.folder, name), error) from error

    @contextlib.contextmanager
    def _writer(self, name: str, descriptor: int) -> Iterator[FileWriter]:
        try:
            with FileWriter(descriptor, self._progress) as writer:
                yield writer
                writer.flush()
                if self._syncs_files:
                    sync_file(writer.sync)
        except SaveError:
            raise
        except OSError as error:
            raise save_error(os.path.join(self.folder, name), error) from error

    def keep(self, name: str) -> None:
        """Have a file of the old checkpoint be one of the new, as durable as the others."""
        if not self._syncs_files:
            return
        path = os.path.join(self.folder, name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                sync_file(partial(os.fsync, descriptor))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise save_error(path, error) from error

    def names(self) -> list[str]:
        """Names of the files in the folder."""
        try:
            with os.scandir(self.folder) as entries:
                return [entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise save_error(self.folder, error, "be listed") from error

    def commit(self, superseded: Iterable[str]) -> tuple[str, ...]:
        """Make the files written the folder's checkpoint.

        Args:
            superseded: names of the old checkpoint's files; those that are written anew may be among them.

        Returns:
            The names that were removed.
        """
        for name in self._temporaries:
            path = os.path.join(self.folder, name)
            if os.path.isdir(path) and not os.path.islink(path):
                raise save_error(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
            if not os.path.lexists(self._path_of_temporary(name)):
                raise SaveError("a file that was just written is gone", file=path, fix="save again")
        renames = dict(self._temporaries)
        journal = Journal(renames, tuple(sorted(set(superseded) - renames.keys())))
        with self.file(JOURNAL_NAME) as writer:
            writer.write(encode_journal(journal).encode())
        try:
            # The journal promises the files, so their names have to be on the disk before its own is.
            self._sync_folder()
            rename(self._path_of_temporary(JOURNAL_NAME), os.path.join(self.folder, JOURNAL_NAME), self._syncs_files)
            self._sync_folder(*self._parents)
            return self._carry_out(journal)
        except OSError as error:
            if not self._is_renaming and self._retract():
                raise save_error(self.folder, error, "be given its new files") from error
            self._is_renaming = True
            raise SaveError(
                f"the new checkpoint is complete, but part of it still has temporary names: {error.strerror}",
                file=os.path.join(self.folder, error.filename or ""),
                fix="fastload loads it as it is; save again, when the cause is gone, to finish the renaming",
            ) from error

    def _path_of_temporary(self, name: str) -> str:
        return os.path.join(self.folder, self._temporaries[name])

    def _carry_out(self, journal: Journal) -> tuple[str, ...]:
        for name in sorted(journal.renames, key=_rank):
            temporary, path = os.path.join(self.folder, journal.renames[name]), os.path.join(self.folder, name)
            before = _identity(path)
            is_first, self._is_renaming = not self._is_renaming, True
            try:
                rename(temporary, path, self._syncs_files)
            except FileNotFoundError:
                # A save that is carried on after a kill finds some of its files renamed.
                if os.path.lexists(temporary):
                    raise
            except OSError:
                # If not even one can be renamed, the old checkpoint is still whole: unless, where there are no
                # renames, the old file had to make room for a copy.
                self._is_renaming = not is_first or _identity(path) != before
                raise
        self._sync_folder()
        removed = tuple(name for name in journal.superseded if _unlink(os.path.join(self.folder, name)))
        if removed:
            self._sync_folder()  # without the journal, an old file that is still there would count
        _unlink(os.path.join(self.folder, JOURNAL_NAME))
        return removed

    def _sync_folder(self, *others: str) -> None:
        if self._syncs_folder:
            for folder in (self.folder, *others):
                sync_folder(folder)

    def _recover(self) -> None:
        """Finish the save that was killed after its journal, and remove what others left before theirs."""
        try:
            journal = read_journal(self.folder)
        except FormatError:
            # It cannot be carried out. This save's own journal will take its place; until then nothing is swept.
            return
        except UnreadableFileError as error:
            raise SaveError(error.problem, file=error.file, fix=error.fix) from error
        try:
            if journal is not None:
                renames = {n: t for n, t in journal.renames.items() if t.startswith(_TEMPORARY_PREFIX)}
                superseded = tuple(name for name in journal.superseded if _WEIGHTS.fullmatch(name))
                self._carry_out(Journal(renames, superseded))
                self._is_renaming = False
            if self._lock is not None:  # else they may belong to a save that is under way
                for name in self.names():
                    if name.startswith(_TEMPORARY_PREFIX):
                        _unlink(os.path.join(self.folder, name))
        except SaveError:
            raise
        except OSError as error:
            raise save_error(self.folder, error, "be cleared of an unfinished save") from error

    def _withdraw(self) -> None:
        """Remove what was written. The journal goes first: it must not promise files that are gone."""
        if not self._retract():
            return
        for name in self._temporaries:
            with contextlib.suppress(OSError):
                _unlink(self._path_of_temporary(name))

    def _retract(self) -> bool:
        """Remove the journal of this save. False where it may still be there: then the new checkpoint counts."""
        try:
            journal = read_journal(self.folder)
            if journal is not None and journal.renames.items() <= self._temporaries.items():
                _unlink(os.path.join(self.folder, JOURNAL_NAME))
        except FormatError:
            pass  # an earlier save's
        except OSError:
            return False
        return True


def _rank(name: str) -> tuple[int, str]:
    """Order of renaming: a reader that knows no journal should find an index's shards, and a config's weights."""
    if name == "config.json":
        return 3, name
    is_index = name.endswith(".json") and _WEIGHTS.fullmatch(name)
    return (1 if is_index else 0 if _WEIGHTS.fullmatch(name) else 2), name


def _make_folder(folder: str) -> list[str]:
    """Make the folder. Returns the folders in which it, and those above it, were made."""
    parents = []
    above = folder
    while not os.path.lexists(above):
        above = os.path.dirname(above)
        parents.append(above)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        problem = "a checkpoint is saved to a folder, and this is a file"
        raise SaveError(problem, file=folder, fix="give another path") from error
    except OSError as error:
        raise save_error(folder, error, "be made") from error
    return parents


def _lock_folder(folder: str) -> int | None:
    """Wait until no other save is at work here; None where the file system has no locks."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor
    return None


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        # Said aloud, because a process forked meanwhile has the descriptor too.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _identity(path: str) -> tuple[int, int] | None:
    """Tells a file from another one that takes its place."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
