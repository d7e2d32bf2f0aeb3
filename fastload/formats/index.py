"""The shard index: which file of a sharded checkpoint holds which key.

A JSON object ``{"metadata": {...}, "weight_map": {key: file name}}``. It is the one file of a checkpoint that
names other files, so it is here that a downloaded checkpoint is kept from reaching outside its folder. The
check is on the names alone: a download cache's folder is made of symbolic links, and those are followed.
"""

from __future__ import annotations

import json
import os
import posixpath
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastload.errors import IndexFileError, UnreadableFileError
from fastload.formats.checksums import CHECKSUMS

__all__ = ["MAX_INDEX_BYTES", "ShardIndex", "checked_names", "encode_index", "read_index"]

#: The largest indexes in use have some 100,000 keys and take 10 MB; a gigabyte is no index.
MAX_INDEX_BYTES = 1 << 30

_MAX_NAME_BYTES = 255  # NAME_MAX of every file system in use


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What an index file says.

    Attributes:
        weight_map: key -> file name, relative to the index's folder and below it.
        metadata: what else was noted, commonly ``total_size`` in bytes; empty where the file has none.
    """

    weight_map: dict[str, str]
    metadata: dict[str, Any]

    @property
    def checksums(self) -> dict[str, str]:
        """File name -> checksum of its header, where the index has them."""
        found = self.metadata.get(CHECKSUMS)
        return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}

    @property
    def shards(self) -> tuple[str, ...]:
        """The file names, each once, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


def read_index(path: str | os.PathLike[str]) -> ShardIndex:
    """Read and check a shard index.

    Raises:
        IndexFileError: it is not an index, or names a file outside its folder; all such names are told.
        UnreadableFileError: the operating system refused to read it.
    """
    content = _parse_object(_read_bounded(path), path)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError(
            "the index maps no key to a file",
            file=path,
            key="weight_map",
            expected="an object {key: file name} with at least one key",
            found="nothing" if weight_map is None else _shortened(weight_map),
            fix="fetch the index again, or save the checkpoint again",
        )
    names = checked_names(weight_map, path)
    metadata = content.get("metadata")
    if not isinstance(metadata, dict | None):
        raise IndexFileError(
            "the index's metadata is not an object",
            file=path,
            key="metadata",
            expected="an object, or no such field",
            found=_shortened(metadata),
            fix="fetch the index again, or remove the field",
        )
    return ShardIndex({key: names[name] for key, name in weight_map.items()}, metadata or {})


def encode_index(
    weight_map: Mapping[str, str],
    total_parameters: int,
    total_size: int,
    checksums: Mapping[str, str] | None = None,
) -> str:
    """The text of an index file, the same bytes as transformers writes but for the checksums.

    Args:
        weight_map: key -> file name.
        total_parameters: number of elements of all tensors.
        total_size: number of bytes of all tensors.
        checksums: file name -> checksum of its header, which stands for the file (see ``fastload.formats.checksums``).
    """
    metadata: dict[str, object] = {"total_parameters": total_parameters, "total_size": total_size}
    if checksums:
        metadata[CHECKSUMS] = dict(checksums)
    index = {"metadata": metadata, "weight_map": dict(weight_map)}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _parse_object(text: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that ``text`` is. A name that stands twice in it is an error, not a silent choice."""
    try:
        content = json.loads(text, object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested by the thousand
        raise IndexFileError(
            "the index is not valid JSON",
            file=path,
            expected="a JSON object, each name once",
            found=str(error),
            fix="fetch the file again, or save the checkpoint again",
        ) from error
    if not isinstance(content, dict):
        raise IndexFileError(
            "the index is not a JSON object",
            file=path,
            expected="an object with a weight_map",
            found=_shortened(content),
            fix="give the path of a checkpoint's index, or fetch the file again",
        )
    return content


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {_shortened(twice)} stands twice in one object")
    return content


def _read_bounded(path: str | os.PathLike[str]) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise IndexFileError("the index is not a regular file", file=path, fix="give the path of a file")
        if status.st_size > MAX_INDEX_BYTES:
            raise IndexFileError(
                "the index is too large to be one",
                file=path,
                expected=f"at most {MAX_INDEX_BYTES} bytes",
                found=f"{status.st_size} bytes",
                fix="check that this file is an index and not the weights",
            )
        with open(path, "rb") as file:
            return file.read(status.st_size)
    except OSError as error:
        raise UnreadableFileError(
            f"the index could not be read: {error.strerror or error}",
            file=path,
            fix="check that the file exists and that this user may read it",
        ) from error


def checked_names(weight_map: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, str]:
    """Every distinct file name of the map -> the name in its plainest spelling."""
    names: dict[str, str] = {}
    bad: dict[str, str] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str):
            bad[key] = _shortened(name)
        elif name not in names:
            problem = _name_problem(name)
            if problem:
                bad[key] = f"{_shortened(name)} {problem}"
            else:
                names[name] = posixpath.normpath(name)
    if bad:
        shown = [f"{key}: {problem}" for key, problem in list(bad.items())[:10]]
        more = [f"and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else []
        raise IndexFileError(
            "the index names files that a shard may not be",
            file=path,
            key=next(iter(bad)),
            expected="names of files in the index's folder",
            found="; ".join(shown + more),
            fix="do not load this checkpoint unless you know who made it",
        )
    return names


def _name_problem(name: str) -> str | None:
    """Why ``name`` cannot be a shard's, or None. A backslash separates on some systems."""
    if "\0" in name:
        return "contains a NUL"
    if "\\" in name:
        return "contains a backslash"
    if name.startswith("/"):
        return "is absolute"
    if ".." in name.split("/"):
        return "leaves the folder"
    if posixpath.normpath(name) == "." or name.endswith("/"):
        return "names no file"
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return "is not text that a file name can be"
    if any(len(part) > _MAX_NAME_BYTES for part in encoded.split(b"/")):
        return "is longer than a file name can be"
    return None


def _shortened(value: object) -> str:
    text = ascii(value) if not isinstance(value, dict | list) else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= 100 else text[:97] + "..."
