"""Which files of a local folder are the checkpoint.

The order of choice is transformers': model.safetensors, its index, pytorch_model.bin, its index. A folder
that holds two checkpoints of the chosen format is an error and not a choice, since one of the two is stale:
that is how old weights come to be loaded in silence.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, replace

from fastload.errors import (
    AmbiguousCheckpointError,
    CheckpointNotFoundError,
    FormatError,
    IndexFileError,
    OptionError,
    UnreadableFileError,
)
from fastload.formats.detection import DCP_METADATA, DCP_SUFFIX
from fastload.formats.index import read_index
from fastload.options import FileOptions
from fastload.sources.journal import FolderView, view_folder
from fastload.sources.names import Candidate, FileFormat, candidates, listed, nothing_found

__all__ = ["ANY_FILES", "CheckpointFiles", "checkpoint_folder", "find_weights", "path_kind"]

#: What is looked for where a caller says nothing.
ANY_FILES = FileOptions()

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_LFS_POINTER = b"version https://git-lfs."


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The files a checkpoint is made of.

    Attributes:
        folder: where they lie; an absolute path, as all others here.
        format: how the weights are written. Go by this and not by the paths' suffix: after an interrupted
            save the files are read under temporary names.
        weights: the weights' files, sorted, each an existing file.
        index: the index they were found through; None for a single file.
        weight_map: key -> path, as the index says; None for a single file.
        notes: choices that a caller may want to know of, a sentence each.
        checksums: path -> checksum of its header, as far as the index has them.
    """

    folder: str
    format: FileFormat
    weights: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] | None = None
    notes: tuple[str, ...] = ()
    checksums: dict[str, str] = field(default_factory=dict)


def find_weights(path: str | os.PathLike[str], options: FileOptions = ANY_FILES) -> CheckpointFiles:
    """The checkpoint at ``path``: a folder, a weights file of any name, or an index.

    Raises:
        CheckpointNotFoundError: nothing is there, or shards that the index names are missing.
        AmbiguousCheckpointError: two checkpoints of the same format are there.
        IndexFileError: the index is damaged, or names files outside its folder.
        FormatError: the file is neither safetensors nor a pickle of torch.
        UnreadableFileError: the operating system refused to read.
        OptionError: the options contradict the file.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if path_kind(path) == "folder":
        return _in_folder(checkpoint_folder(path, options.subfolder), options)
    folder, name = os.path.split(path)
    view = view_folder(folder)
    if path_kind(view.path(name)) != "file":
        raise CheckpointNotFoundError(
            "there is no such file or folder",
            file=path,
            fix="check the path; a relative one starts from " + os.getcwd(),
        )
    if options.subfolder:
        raise OptionError(
            "a subfolder was asked for, but the path is a file",
            expected="a folder",
            found=path,
            fix="give the folder, or leave subfolder out",
        )
    return _from_file(view, name, options)


def path_kind(path: str) -> str | None:
    """``"folder"``, ``"file"`` (or what is no folder), or None for nothing. Raises UnreadableFileError."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    return "folder" if stat.S_ISDIR(mode) else "file"


def checkpoint_folder(folder: str, subfolder: str) -> str:
    """``folder/subfolder``, which must be a folder."""
    if not subfolder:
        return folder
    path = os.path.normpath(os.path.join(folder, subfolder))
    kind = path_kind(path)
    if kind != "folder":
        with_folders = [entry.name for entry in _entries(folder) if entry.is_dir()]
        raise CheckpointNotFoundError(
            "the subfolder does not exist" if kind is None else "the subfolder is a file",
            file=path,
            expected="a folder",
            found=f"in {folder} these folders: {listed(with_folders)}",
            fix="name one of these, or leave subfolder out",
        )
    return path


def _in_folder(folder: str, options: FileOptions) -> CheckpointFiles:
    try:
        view = view_folder(folder)
        names = view.names()
    except OSError as error:
        if isinstance(error, UnreadableFileError):
            raise
        raise _unreadable(folder, error) from error
    present = [c for c in candidates(options) if c.single in names or c.index in names]
    if not present and options.variant is None and options.use_safetensors is None:
        if DCP_METADATA in names:
            return _of_ranks(view, names)
        if any(name.endswith(DCP_SUFFIX) for name in names):
            raise CheckpointNotFoundError(
                "the folder holds files of torch.distributed.checkpoint, but not what says what is in them",
                file=folder,
                expected=DCP_METADATA,
                found=listed(names),
                fix=f"copy {DCP_METADATA} too, which is hidden; if there is none, the save did not come to its end",
            )
    if not present:
        raise nothing_found(folder, (name for name in names if not name.startswith(".")), options)
    chosen = present[0]
    if chosen.single not in names:
        files = _sharded(view, chosen.index)
    else:
        notes = _compare(view, chosen, names) if chosen.index in names else ()
        files = replace(_single(view, chosen.single), notes=notes)
    others = [name for c in present[1:] for name in c.names if name in names]
    return replace(files, notes=files.notes + tuple(f"{name} is also here and was not used" for name in others))


def _compare(view: FolderView, chosen: Candidate, names: set[str]) -> tuple[str, ...]:
    """What to note of an index beside a single file; raises if both are checkpoints."""
    try:
        shards = read_index(view.path(chosen.index)).shards
    except (IndexFileError, UnreadableFileError) as error:
        return (f"{chosen.index} is also here, cannot be read ({error.problem}) and was not used",)
    others = [name for name in shards if name != chosen.single]
    if not others:
        return ()
    there = [name for name in others if name in names or os.path.lexists(view.path(name))]
    if not there:
        return (f"{chosen.index} is also here, none of its shards is, and it was not used",)
    raise AmbiguousCheckpointError(
        "the folder holds two checkpoints, and nothing says which is the current one",
        file=view.folder,
        expected=f"either {chosen.single} or {chosen.index} with its shards",
        found=f"{chosen.single}, and {chosen.index} with {listed(there, 4)}",
        fix="delete the stale one, or give the path of the file or of the index that is wanted",
    )


def _of_ranks(view: FolderView, names: set[str]) -> CheckpointFiles:
    """The files that ranks wrote through torch.distributed.checkpoint."""
    files = sorted(name for name in names if name.endswith(DCP_SUFFIX))
    for name in files:
        _require_weights(view.path(name), name, _status(view.path(name)))
    return CheckpointFiles(view.folder, "dcp", tuple(map(view.path, files)), index=view.path(DCP_METADATA))


def _from_file(view: FolderView, name: str, options: FileOptions) -> CheckpointFiles:
    if name == DCP_METADATA or name.endswith(DCP_SUFFIX):
        raise OptionError(
            "a checkpoint that several ranks wrote is a folder, and this is one file of it",
            file=os.path.join(view.folder, name),
            fix="give the folder",
        )
    files = _sharded(view, name) if name.endswith(".json") else _single(view, name)
    wanted = {None: files.format, True: "safetensors", False: "bin"}[options.use_safetensors]
    if files.format != wanted:
        raise OptionError(
            f"use_safetensors={options.use_safetensors}, but the file given holds .{files.format} weights",
            file=os.path.join(view.folder, name),
            fix="leave use_safetensors out, or give another file",
        )
    return files


def _single(view: FolderView, name: str) -> CheckpointFiles:
    path = view.path(name)
    _require_weights(path, name, _status(path))
    return CheckpointFiles(view.folder, _format_of(path, name), (path,))


def _sharded(view: FolderView, index_name: str) -> CheckpointFiles:
    index_path = view.path(index_name)
    index = read_index(index_path)
    paths = {name: view.path(name) for name in index.shards}
    statuses = {name: _status(path) for name, path in paths.items()}
    missing = [name for name, status in statuses.items() if status is None]
    if missing:
        raise CheckpointNotFoundError(
            f"{len(missing)} of {len(paths)} shards that the index names are missing",
            file=index_path,
            expected=f"in {view.folder}: {', '.join(missing)}",
            found=listed(name for name in paths if name not in missing),
            fix="fetch the missing files, or delete the index if it is stale",
        )
    if len({name.endswith(".safetensors") for name in paths}) == 2:
        raise IndexFileError(
            "the index names files of two formats",
            file=index_path,
            expected="all .safetensors, or none",
            found=listed(paths, 6),
            fix="save the checkpoint again",
        )
    for name, path in paths.items():
        _require_weights(path, name, statuses[name])
    return CheckpointFiles(
        folder=view.folder,
        format=_format_of(path, name),
        weights=tuple(sorted(paths.values())),
        index=index_path,
        weight_map={key: paths[name] for key, name in index.weight_map.items()},
        checksums={paths[name]: checksum for name, checksum in index.checksums.items() if name in paths},
    )


def _status(path: str) -> os.stat_result | None:
    """What the system says of a file, asked once; None where it is not there. Raises UnreadableFileError."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _require_weights(path: str, name: str, status: os.stat_result | None) -> None:
    """Raise unless ``path``, of which the system says this, is a file, and is more than a promise of one."""
    if status is None:  # listed in the folder, yet not there
        raise CheckpointNotFoundError(
            f"{name} is a link to a file that does not exist",
            file=path,
            found=f"a link to {os.path.realpath(path)}",
            fix="restore that file, or fetch the checkpoint again",
        )
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointNotFoundError(
            f"{name} is not a file",
            file=path,
            expected="a file with weights",
            fix="move it away or give another path",
        )
    if status.st_size < 1024 and _beginning(path).startswith(_LFS_POINTER):
        raise FormatError(
            f"{name} is a pointer of Git LFS, and not the weights themselves",
            file=path,
            expected="the weights",
            found=f"{status.st_size} bytes of text",
            fix="run 'git lfs pull' in the repository, or download the file",
        )


def _format_of(path: str, name: str) -> FileFormat:
    """safetensors by the suffix, else what the first bytes show. A reader checks the rest."""
    if name.endswith(".safetensors"):
        return "safetensors"
    start = _beginning(path)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(path):
        return "safetensors"
    is_zip, is_pickle, is_tar = start.startswith(b"PK"), start.startswith(b"\x80"), start[257:262] == b"ustar"
    if is_zip or is_pickle or is_tar or name.endswith(_PICKLE_SUFFIXES):
        return "bin"
    raise FormatError(
        "the file is neither safetensors nor a .bin of torch",
        file=path,
        expected="a safetensors header, a zip archive or a pickle",
        found=f"a file that begins with {start[:16]!r}" if start else "an empty file",
        fix="give the path of a weights file, of an index, or of a checkpoint's folder",
    )


def _beginning(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except OSError as error:
        raise _unreadable(path, error) from error


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: str, error: OSError) -> UnreadableFileError:
    return UnreadableFileError(
        f"{os.path.basename(path)} could not be read: {error.strerror or error}",
        file=path,
        fix="give this user the right to read it and to enter every folder above it",
    )
