"""From tensors to a checkpoint in a folder: collect -> shard -> write -> commit."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastload import dtypes
from fastload.errors import OptionError, SaveError, UnknownDtypeError
from fastload.formats.index import encode_index
from fastload.options import Durability, FileOptions, parse_durability
from fastload.plan.sharding import parse_size, split_into_shards
from fastload.sources.commit import FolderCommit
from fastload.sources.names import candidates, shard_name
from fastload.storage.devices import Devices, device_for
from fastload.storage.sharing import byte_span
from fastload.storing import Shard, Stored, as_bin, as_safetensors

__all__ = ["SaveReport", "checked_metadata", "checked_tensors", "save_checkpoint", "save_state_dict"]

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
            and notes the other names in its metadata; a .bin keeps all names, and the sharing.
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
    options = FileOptions(variant=variant, use_safetensors=safe_serialization)
    single, index_name = candidates(options)[0].names
    small_files = _encoded(extra_files or {}, variant)
    tensors = checked_tensors(state_dict, deferred or {})
    if safe_serialization:
        content = as_safetensors(tensors, tied or {}, checked_metadata(metadata or {}), deferred or {}, devices)
    elif incremental:
        raise OptionError(
            "a .bin has no checksums to know it again by", fix="save as safetensors, or leave incremental out"
        )
    elif metadata:
        raise OptionError("a .bin has no place for metadata", fix="save as safetensors, or leave metadata out")
    else:
        content = as_bin(tensors, deferred or {})
    shards = _divide(content, parse_size(max_shard_size), shards)
    names = [shard_name(single, number, len(shards)) for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [single]
    # All that can be wrong with the tensors is told before the folder is touched.
    files = {name: content.prepare(keys) for name, keys in zip(names, shards, strict=True)}
    # A torch.save in hand holds copies of its shard; what is on a device or yet to be loaded has its own order.
    in_parallel = safe_serialization and all(tensor.device.type == "cpu" for tensor in tensors.values())
    n_writers = min(len(shards), _MAX_WRITERS) if in_parallel else 1
    tell = _Progress(progress)
    with FolderCommit(os.path.abspath(folder), durability=parse_durability(durability), progress=tell) as commit:
        written = _write_all(commit, files, n_writers, tell, incremental)
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            n_elements = content.n_elements if n_parameters is None else n_parameters
            checksums = {name: written[name].checksum for name in names if written[name].checksum}
            index = encode_index(weight_map, n_elements, content.n_bytes, checksums)
            small_files = {index_name: index.encode(), **small_files}
        for name, data in small_files.items():
            with commit.file(name) as writer:
                writer.write(data)
        kept = tuple(name for name in names if written[name].is_kept)
        removed = commit.commit(name for name in commit.names() if _is_weights(name, variant) and name not in kept)
    return SaveReport(
        folder=os.fspath(folder),
        files=(*(name for name in names if name not in kept), *small_files),
        n_tensors=len(content.sizes),
        n_bytes=content.n_bytes,
        seconds=time.perf_counter() - begin,
        removed=removed,
        kept=kept,
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


def checked_tensors(state_dict: Mapping[str, torch.Tensor], deferred: Container[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors without their gradients, each one that a file can hold; an error names all others."""
    tensors: dict[str, torch.Tensor] = {}
    on_meta, problems = [], []
    for key, value in state_dict.items():
        problem = _problem(key, value)
        if problem is not None:
            problems.append(f"{key!r} {problem}")
        elif key not in deferred and (value.is_meta or value.untyped_storage().device.type == "meta"):
            on_meta.append(key)
        else:
            tensors[key] = value.detach().resolve_conj().resolve_neg()
    if problems:
        raise OptionError(
            "the state dict holds what a checkpoint cannot",
            expected="tensors by name, each dense and on one device",
            found="; ".join(problems),
            fix="leave these out, or convert them",
        )
    if on_meta:
        raise SaveError(
            f"{len(on_meta)} tensors are on the meta device and have no values to save",
            expected="tensors with values",
            found=", ".join(on_meta),
            fix="load or initialise them first",
        )
    return tensors


def _problem(key: object, value: object) -> str | None:
    """Why this cannot be saved; None if it can."""
    if not isinstance(key, str):
        return "is no text, as a name must be"
    if not isinstance(value, torch.Tensor):
        return f"is no tensor but {type(value).__name__}"
    if _is_wrapper(value):
        return f"is of {type(value).__name__}, which stands for tensors elsewhere (a DTensor has full_tensor())"
    if value.is_quantized:
        return "is quantised (dequantize() makes a plain tensor)"
    if value.layout != torch.strided or value.is_nested:
        return "is sparse or nested (to_dense() makes a plain tensor)"
    try:
        dtypes.from_torch(value.dtype)
    except UnknownDtypeError:
        return f"is of {value.dtype}, which no checkpoint format holds"
    if not value.is_meta and byte_span(value)[1] > value.untyped_storage().nbytes():
        return "has no memory (it was released; FSDP gathers parameters with summon_full_params)"
    return None


def _is_wrapper(value: torch.Tensor) -> bool:
    return is_traceable_wrapper_subclass(value)


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


def checked_metadata(metadata: Mapping[str, object]) -> dict[str, str]:
    """The text by name. OptionError if it is something else."""
    texts = {name: text for name, text in metadata.items() if isinstance(name, str) and isinstance(text, str)}
    if len(texts) != len(metadata):
        others = [repr(item) for item in metadata.items() if item[0] not in texts]
        raise OptionError("metadata is text by name", expected="str for each str", found=", ".join(others))
    return texts


def _is_weights(name: str, variant: str | None) -> bool:
    """Whether a save of this variant, in whichever format and number of shards, has a file of this name."""
    for candidate in candidates(FileOptions(variant=variant)):
        stem, _, suffix = candidate.single.rpartition(".")
        shard = rf"{re.escape(stem)}-\d{{5,}}-of-\d{{5,}}\.{suffix}"
        if name in candidate.names or re.fullmatch(shard, name):
            return True
    return False
