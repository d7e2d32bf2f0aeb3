"""From tensors to a checkpoint in a folder: collect -> shard -> write -> commit."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastload.distributed.detection import are_laid_out
from fastload.errors import OptionError, SaveError
from fastload.formats.index import encode_index
from fastload.options import Durability, FileOptions, parse_durability
from fastload.plan.sharding import parse_size, split_into_shards
from fastload.sources.commit import FolderCommit
from fastload.sources.names import candidates, shard_name
from fastload.storable import checked_metadata, checked_tensors
from fastload.storage.devices import Devices, device_for
from fastload.storing import SafetensorsShard, Shard, Stored, as_bin, as_safetensors

if TYPE_CHECKING:
    from fastload.distributed.parts import Part

__all__ = ["SaveReport", "save_checkpoint", "save_state_dict"]

# More than these do not write faster, and each may hold a copy of a tensor that is not contiguous.
_MAX_WRITERS = 4


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did.

    Attributes:
        folder: where.
        files: names of the files written, weights first.
        n_tensors: number of names that were stored.
        n_bytes: bytes of their tensors; those that share memory count once.
        seconds: time it took.
        removed: names of files of an earlier save that are no part of this one.
        kept: names of shards that an earlier save wrote, with the same tensors; they are not among ``files``.
    """

    folder: str
    files: tuple[str, ...]
    n_tensors: int
    n_bytes: int
    seconds: float
    removed: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        files = f"{len(self.files)} file{'s' if len(self.files) != 1 else ''}"
        kept = f", kept {', '.join(self.kept)}" if self.kept else ""
        removed = f", removed {', '.join(self.removed)}" if self.removed else ""
        size = f"{self.n_tensors:,} tensors, {self.n_bytes / 1e6:,.1f} MB"
        return f"saved {size} in {files} to {self.folder} in {self.seconds:.2f} s{kept}{removed}"


def save_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    metadata: Mapping[str, str] | None = None,
    variant: str | None = None,
    progress: Callable[[int], None] | None = None,
    durability: Durability = "full",
    incremental: bool = False,
) -> SaveReport:
    """Save tensors by key, without a config. Arguments and errors are those of ``save_checkpoint``."""
    return save_checkpoint(
        state_dict,
        folder,
        max_shard_size=max_shard_size,
        safe_serialization=safe_serialization,
        metadata=metadata,
        variant=variant,
        progress=progress,
        durability=durability,
        incremental=incremental,
    )


def save_checkpoint(
    state_dict: Mapping[str, torch.Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    variant: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    tied: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    shards: Sequence[Sequence[str]] | None = None,
    n_parameters: int | None = None,
    deferred: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    in_files: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None,
    progress: Callable[[int], None] | None = None,
    durability: Durability = "full",
    incremental: bool = False,
    devices: Devices = device_for,
) -> SaveReport:
    """Replace the checkpoint of a folder by this one.

    Whatever happens meanwhile, the folder loads as the old checkpoint or as the new one. It may be the folder that
    the tensors are mapped from. Weights of the same variant that are no part of the new checkpoint are removed: other
    shards, the other format, a stale index.

    Args:
        state_dict: tensors by key, on any device. A safetensors file stores tensors that are the same memory once,
            and notes the other names in its metadata; a .bin keeps all names, and the sharing. With DTensors among
            them all ranks of the default process group have to call, and write one checkpoint together.
        folder: made if need be, with its parents.
        max_shard_size: most bytes of a shard, as a number or as text: "5GB" is 5e9, "5GiB" 5 * 2**30. A tensor that
            is larger has a shard to itself.
        safe_serialization: True for safetensors, False for .bin.
        variant: the ``fp16`` of ``model.fp16.safetensors``.
        extra_files: small files that belong to the checkpoint, such as config.json: name -> text or bytes.
        tied: key -> key of which it is a duplicate; of tensors that are the same memory, the latter is stored.
        metadata: text for ``__metadata__`` of safetensors files, beside ``{"format": "pt"}``.
        shards: the keys of each shard, where they are to be divided in another way than by size.
        n_parameters: what the index gives as ``total_parameters``; otherwise the elements of all tensors.
        deferred: key of a tensor on the meta device -> what loads it, called when it is to be written, so that no
            more than one such tensor need be in memory (of a .bin, those of one shard).
        in_files: makes of state_dict that of the files, where these have other names, or pieces of tensors as views.
        progress: called with the number of bytes whenever some were written.
        durability: "full" has the files and their names on the disk when the save returns, so that a power failure is
            as harmless as a kill; "data" has the files there before the old ones are given up, but leaves it to the
            operating system when the names follow; "none" leaves all to it.
        incremental: keep shards of the folder's earlier save that have the names, shapes and values to be written.
            That is seen from the checksums in their headers: the tensors are read, the files are not (`fastload verify`
            reads them). For safetensors.
        devices: the device of a name, for tensors of a safetensors file that are copied out while others are written.

    Raises:
        OptionError: an argument cannot be meant, or something in state_dict cannot be saved; all such are named.
        SaveError: tensors are on the meta device, or the operating system refused to write; whatever checkpoint was
            in the folder is still there.
    """
    begin = time.perf_counter()
    form = _Form(
        variant=variant,
        as_safetensors=safe_serialization,
        max_shard_bytes=parse_size(max_shard_size),
        small_files=_encoded(extra_files or {}, variant),
        shards=shards,
        n_parameters=n_parameters,
    )
    texts = checked_metadata(metadata or {})
    if not safe_serialization and (incremental or texts):
        raise _not_in_a_bin("metadata" if texts else "incremental")
    target = _Target(os.fspath(folder), parse_durability(durability), progress)
    if are_laid_out(state_dict.values()):
        if incremental or not safe_serialization:
            raise _not_by_all_ranks("incremental" if incremental else "safe_serialization=False")
        from fastload.distributed.parts import parts_of

        collect = partial(parts_of, state_dict, checked_tensors, in_files)
        report = _save_together(collect, target, form, tied or {}, texts, devices)
    else:
        tensors = checked_tensors(in_files(state_dict) if in_files else state_dict, deferred or {})
        if safe_serialization:
            content = as_safetensors(tensors, tied or {}, texts, deferred or {}, devices)
        else:
            content = as_bin(tensors, deferred or {})
        # A torch.save in hand holds copies of its shard; what is on a device or yet to be loaded has its own order.
        in_parallel = safe_serialization and all(tensor.device.type == "cpu" for tensor in tensors.values())
        report = _save_alone(content, target, form, _MAX_WRITERS if in_parallel else 1, incremental)
    return replace(report, folder=os.fspath(folder), seconds=time.perf_counter() - begin)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a save goes, what it waits for, and who is told of its progress."""

    folder: str
    durability: Durability
    progress: Callable[[int], None] | None


@dataclass(frozen=True, slots=True)
class _Form:
    """How tensors become the files of a checkpoint.

    Attributes:
        variant, shards, n_parameters: as for ``save_checkpoint``.
        as_safetensors: or else as .bin.
        max_shard_bytes: most bytes of a shard.
        small_files: those beside the weights, name -> contents.
    """

    variant: str | None
    as_safetensors: bool
    max_shard_bytes: int
    small_files: Mapping[str, bytes]
    shards: Sequence[Sequence[str]] | None
    n_parameters: int | None

    def lay_out(self, content: Stored) -> tuple[dict[str, list[str]], dict[str, Shard]]:
        """The keys of each file, and the files. All that can be wrong with the tensors is told here."""
        single, _ = self._names()
        shards = _divide(content, self.max_shard_bytes, self.shards)
        names = [shard_name(single, number, len(shards)) for number in range(1, len(shards) + 1)]
        keys_of = dict(zip(names if len(shards) > 1 else [single], shards, strict=True))
        return keys_of, {name: content.prepare(keys) for name, keys in keys_of.items()}

    def conclude(
        self,
        content: Stored,
        keys_of: Mapping[str, Sequence[str]],
        commit: FolderCommit,
        checksums: Mapping[str, str],
        kept: Sequence[str] = (),
    ) -> SaveReport:
        """Write index and small files once the shards are complete, and commit.

        Args:
            content: the tensors.
            keys_of: the keys of each shard.
            commit: the save.
            checksums: of each shard, where the format has them.
            kept: shards of an earlier save.
        """
        small_files = dict(self.small_files)
        if len(keys_of) > 1:
            weight_map = {key: name for name, keys in keys_of.items() for key in keys}
            n_elements = content.n_elements if self.n_parameters is None else self.n_parameters
            index = encode_index(weight_map, n_elements, content.n_bytes, checksums)
            small_files = {self._names()[1]: index.encode(), **small_files}
        for name, data in small_files.items():
            with commit.file(name) as writer:
                writer.write(data)
        old = [name for name in commit.names() if _is_weights(name, self.variant) and name not in kept]
        removed = commit.commit(old)
        files = (*(name for name in keys_of if name not in kept), *small_files)
        n_tensors = len(content.sizes)
        return SaveReport(commit.folder, files, n_tensors, content.n_bytes, 0.0, removed, tuple(kept))

    def _names(self) -> tuple[str, str]:
        """The name of a single file, and of an index."""
        options = FileOptions(variant=self.variant, use_safetensors=self.as_safetensors)
        single, index = candidates(options)[0].names
        return single, index


def _save_alone(content: Stored, target: _Target, form: _Form, max_writers: int, incremental: bool) -> SaveReport:
    """Save what this process has."""
    keys_of, files = form.lay_out(content)
    tell = _Progress(target.progress)
    with FolderCommit(os.path.abspath(target.folder), durability=target.durability, progress=tell) as commit:
        written = _write_all(commit, files, min(len(files), max_writers), tell, incremental)
        checksums = {name: shard.checksum for name, shard in written.items() if shard.checksum}
        kept = [name for name, shard in written.items() if shard.is_kept]
        return form.conclude(content, keys_of, commit, checksums, kept)


def _save_together(
    collect: Callable[[], Mapping[str, Part]],
    target: _Target,
    form: _Form,
    tied: Mapping[str, str],
    metadata: Mapping[str, str],
    devices: Devices,
) -> SaveReport:
    """Save what all ranks of the process group have."""
    from fastload.distributed.saving import Target, save_together

    def lay_out(
        likenesses: Mapping[str, torch.Tensor], memories: Mapping[str, Hashable]
    ) -> tuple[dict[str, Target], Callable[[FolderCommit, Mapping[str, str]], SaveReport]]:
        content = as_safetensors(likenesses, tied, metadata, {}, memories=memories)
        keys_of, files = form.lay_out(content)
        shards = {name: file for name, file in files.items() if isinstance(file, SafetensorsShard)}
        targets = {name: Target(shard.header, shard.offsets) for name, shard in shards.items()}
        return targets, partial(form.conclude, content, keys_of)

    return save_together(
        collect,
        os.path.abspath(target.folder),
        lay_out,
        durability=target.durability,
        progress=target.progress,
        devices=devices,
    )


def _not_in_a_bin(option: str) -> OptionError:
    if option == "incremental":
        problem = "a .bin has no checksums to know it again by"
    else:
        problem = "a .bin has no place for metadata"
    return OptionError(problem, fix=f"save as safetensors, or leave {option} out")


def _not_by_all_ranks(option: str) -> OptionError:
    return OptionError(
        "ranks that save together write all of a checkpoint, as safetensors",
        key=option,
        found="tensors that are laid out over ranks (DTensors)",
        fix=f"leave out {option}",
    )


class _Written(NamedTuple):
    """What became of a shard: its checksum, and whether an earlier save had written it."""

    checksum: str
    is_kept: bool


class _Progress:
    """Progress of several threads told one at a time; and what ends their writing when one of them failed."""

    def __init__(self, progress: Callable[[int], None] | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self.is_abandoned = False

    def __call__(self, n_bytes: int) -> None:
        with self._lock:
            if self.is_abandoned:
                raise SaveError("the save was abandoned, because another file could not be written")
            if self._progress is not None:
                self._progress(n_bytes)


def _write_all(
    commit: FolderCommit, shards: Mapping[str, Shard], n_writers: int, progress: _Progress, incremental: bool
) -> dict[str, _Written]:
    def write(name: str) -> _Written:
        found = shards[name].find(os.path.join(commit.folder, name)) if incremental else None
        if found is not None:
            commit.keep(name)
            return _Written(found, is_kept=True)
        with commit.file(name) as writer:
            return _Written(shards[name].write(writer), is_kept=False)

    if n_writers == 1:
        return {name: write(name) for name in shards}
    with ThreadPoolExecutor(n_writers, thread_name_prefix="fastload-save") as pool:
        futures = {name: pool.submit(write, name) for name in shards}
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:
            progress.is_abandoned = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: future.result() for name, future in futures.items()}


def _divide(content: Stored, max_shard_bytes: int, shards: Sequence[Sequence[str]] | None) -> list[list[str]]:
    """The keys of each shard: as given, or by size."""
    if shards is None:
        return split_into_shards(content.sizes, max_shard_bytes, content.together)
    number_of = {key: number for number, keys in enumerate(shards) for key in keys}
    numbers: dict[Hashable, set[int | None]] = {}
    for key, group in content.together.items():
        numbers.setdefault(group, set()).add(number_of.get(key))
    divided = [group for group in numbers.values() if len(group) > 1]
    if sum(map(len, shards)) != len(number_of) or number_of.keys() != content.sizes.keys() or divided:
        raise OptionError(
            "the shards are not a division of the tensors",
            expected="each key that is stored in one shard, and tensors that share memory in the same",
            found=", ".join(sorted(number_of.keys() ^ content.sizes.keys())) or "a key that is there twice, or apart",
        )
    return [list(keys) for keys in shards]


def _encoded(texts: Mapping[str, str | bytes], variant: str | None) -> dict[str, bytes]:
    """The small files as bytes, under names that no other file of the checkpoint can have."""
    for name in texts:
        is_plain = os.path.basename(name) == name and name not in ("", ".", "..")
        if not is_plain or name.startswith(".fastload") or _is_weights(name, variant):
            raise OptionError("not a name for a file beside the weights", expected="a plain name", found=repr(name))
    try:
        return {name: text.encode() if isinstance(text, str) else text for name, text in texts.items()}
    except UnicodeEncodeError as error:
        raise OptionError("the text of a file is not Unicode", found=str(error)) from None


def _is_weights(name: str, variant: str | None) -> bool:
    """Whether a save of this variant, in whichever format and number of shards, has a file of this name."""
    for candidate in candidates(FileOptions(variant=variant)):
        stem, _, suffix = candidate.single.rpartition(".")
        shard = rf"{re.escape(stem)}-\d{{5,}}-of-\d{{5,}}\.{suffix}"
        if name in candidate.names or re.fullmatch(shard, name):
            return True
    return False
