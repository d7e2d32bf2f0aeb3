"""The names that the files of a checkpoint have, and what to say when none of them is there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fastload.errors import CheckpointNotFoundError
from fastload.options import FileOptions

__all__ = ["CONFIG_NAME", "Candidate", "FileFormat", "candidates", "listed", "nothing_found", "shard_name"]

FileFormat: TypeAlias = Literal["safetensors", "bin", "dcp"]

CONFIG_NAME = "config.json"

_STEMS: dict[FileFormat, str] = {"safetensors": "model", "bin": "pytorch_model"}
_SHARD = re.compile(r"(?P<stem>model|pytorch_model)(\.(?P<variant>.+))?-\d+-of-\d+\.(safetensors|bin)")
_SINGLE = re.compile(r"(model(\.(?P<safe>.+))?\.safetensors)|(pytorch_model(\.(?P<bin>.+))?\.bin)")
_INDEX = re.compile(r"(model\.safetensors|pytorch_model\.bin)\.index(\.(?P<variant>.+))?\.json")


@dataclass(frozen=True, slots=True)
class Candidate:
    """The two ways in which weights of one format can lie in a folder: one file, or shards with an index."""

    file_format: FileFormat
    single: str
    index: str

    @property
    def names(self) -> tuple[str, str]:
        """Both, in order of choice."""
        return self.single, self.index


def candidates(options: FileOptions) -> tuple[Candidate, ...]:
    """What to look for, in order of choice: safetensors before .bin; in each, ``single`` before ``index``."""
    infix = "" if options.variant is None else f".{options.variant}"
    every = tuple(
        Candidate(file_format, f"{stem}{infix}.{file_format}", f"{stem}.{file_format}.index{infix}.json")
        for file_format, stem in _STEMS.items()
    )
    if options.use_safetensors is None:
        return every
    return every[:1] if options.use_safetensors else every[1:]


def shard_name(single: str, number: int, count: int) -> str:
    """``model-00001-of-00003.safetensors`` of ``model.safetensors``; ``number`` counts from 1."""
    stem, _, suffix = single.rpartition(".")
    return f"{stem}-{number:05d}-of-{count:05d}.{suffix}"


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Names for a message: sorted, and not too many."""
    shown = sorted(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return (", ".join(shown[:limit]) or "nothing") + more


def nothing_found(where: str, names: Iterable[str], options: FileOptions) -> CheckpointNotFoundError:
    """The error for a folder or repository that has none of the candidates, with the likeliest reason.

    Args:
        where: the folder or repository.
        names: the files that are there, without folders.
        options: what was asked for.
    """
    names = set(names)
    problem, fix = _reason(names, options)
    expected = " or ".join(name for candidate in candidates(options) for name in candidate.names)
    return CheckpointNotFoundError(problem, file=where, expected=expected, found=listed(names), fix=fix)


def _reason(names: set[str], options: FileOptions) -> tuple[str, str]:
    if not names:
        return "there are no files here at all", "give the folder that holds config.json and the weights"
    any_format = candidates(FileOptions(variant=options.variant))
    for candidate in any_format:
        if candidate.single in names or candidate.index in names:
            rule = f"use_safetensors={options.use_safetensors}"
            return (
                f"the weights here are .{candidate.file_format}, which {rule} rules out",
                f"leave out {rule}",
            )
    variants = _variants(names) - {options.variant}
    if variants:
        asked = "without a variant" if options.variant is None else f"of the variant {options.variant!r}"
        ways = [f"variant={variant!r}" for variant in sorted(variants - {None}, key=str)]
        ways += ["leave variant out"] if None in variants else []
        return f"there are no weights {asked} here, but others are", "pass " + " or ".join(ways)
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        return (
            "there are shards here, but no index that says which key is in which",
            "fetch the index too; it lies beside the shards where they came from",
        )
    return (
        "there are no weights here under any name that is looked for",
        "give another folder, its subfolder, or the path of the weights file itself",
    )


def _variants(names: set[str]) -> set[str | None]:
    """Variants that are present as one file or as an index; None stands for the plain names."""
    found: set[str | None] = set()
    for name in names:
        if _SHARD.fullmatch(name):
            continue
        if match := _SINGLE.fullmatch(name):
            found.add(match["safe"] or match["bin"])
        elif match := _INDEX.fullmatch(name):
            found.add(match["variant"])
    return found
