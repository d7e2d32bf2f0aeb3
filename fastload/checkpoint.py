"""A checkpoint, opened: what is in it, and its tensors on demand."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from fastload.errors import FormatError, IndexFileError, OptionError
from fastload.formats.checksums import CHECKSUMS
from fastload.formats.detection import read_file
from fastload.formats.specs import FusedSpec, TensorSpec
from fastload.options import FileOptions, HubOptions
from fastload.prefetching import Prefetch, read_ahead
from fastload.reports import collapse_keys
from fastload.sources.local import CheckpointFiles
from fastload.sources.resolve import locate_checkpoint
from fastload.sources.steady import read_steadily

if TYPE_CHECKING:
    import torch

    from fastload.storage.mapping import MappedFile

__all__ = ["Checkpoint", "TensorSlice", "open_checkpoint"]


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a checkpoint by key. Opening reads headers only; a tensor is mapped when it is asked for.

    Tensors are views of private mappings: they cost no memory until they are used, writing to one does not change the
    file, and they outlive this object. The files are held open: a save that replaces them later changes nothing here.

    Attributes:
        files: the weight files.
        format: ``"safetensors"``, ``"bin"``, or ``"dcp"`` for a folder of torch.distributed.checkpoint.
        specs: every tensor's description, by key, file by file in each file's own order.
        fused: those that lie in several places instead, as chunks that ranks have written (``"dcp"``).
        aliases: names that were dropped when equal tensors were stored once -> the key that was kept. They are not
            keys of the mapping; `load_state_dict` gives them back.
        metadata: the text that safetensors files carry, of all files together, without their checksums.
        others: keys of what the files hold beside tensors; only a .bin can.
        notes: choices made when the files were looked for, or are read ahead.

    Args:
        files: where it is.
        tolerant: go on where index and files disagree, as transformers does: what no file holds is missing, and of a
            key in several files without a word of the index the last one counts. Otherwise both are errors.
    """

    def __init__(self, files: CheckpointFiles, *, tolerant: bool = False) -> None:
        self.files = files.weights
        self.format = files.format
        self.notes = files.notes
        self.specs: dict[str, TensorSpec] = {}
        self.fused: dict[str, FusedSpec] = {}
        self.others: tuple[str, ...] = ()
        self.metadata: dict[str, str] = {}
        self._checksums = files.checksums
        self._n_file_bytes: dict[str, int] = {}
        self._modified_ns: dict[str, int | None] = {}
        self._open_files: dict[str, MappedFile] = {}
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, _close, self._descriptors)
        for path in files.weights:
            with suppress(OSError):  # then reading it says why
                # Opening a named pipe would otherwise wait for somebody to write to it.
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                os.set_blocking(self._descriptors[path], True)
        if files.format == "dcp":
            from fastload.formats.dcp import read_folder

            contents_by_path, self.fused = read_folder(files.folder)
            self.files = tuple(contents_by_path)
        else:
            contents_by_path = {path: read_file(path, self._descriptors.get(path)) for path in files.weights}
        for path, contents in contents_by_path.items():
            self._n_file_bytes[path] = contents.n_file_bytes
            self._modified_ns[path] = contents.modified_ns
            self.metadata.update(contents.metadata)
            self.metadata.pop(CHECKSUMS, None)  # they are the file's, not the checkpoint's
            self._add(contents.specs, path, files.weight_map, tolerant)
            self.others += contents.others
        if not tolerant:
            self._check_index(files)
        self.aliases = {
            dropped: kept
            for dropped, kept in self.metadata.items()
            if dropped != "format" and kept in self.specs and dropped not in self.specs
        }

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors; storages that tensors share count once."""
        whole = {spec.region[:3]: spec.region.n_bytes for spec in self.specs.values()}
        return sum(whole.values()) + sum(spec.n_bytes for spec in self.fused.values())

    def __getitem__(self, key: str) -> torch.Tensor:
        spec = self.spec(key)
        if isinstance(spec, FusedSpec):
            return self._assembled(spec)
        return self.open_file(spec.region.file).tensor(spec)

    def __contains__(self, key: object) -> bool:
        return key in self.specs or key in self.fused

    def __iter__(self) -> Iterator[str]:
        return chain(self.specs, self.fused)

    def __len__(self) -> int:
        return len(self.specs) + len(self.fused)

    def spec(self, key: str) -> TensorSpec | FusedSpec:
        """The description of a tensor, wherever it lies. KeyError for what is not there."""
        return self.fused.get(key) or self.specs[key]

    def release(self, key: str) -> None:
        """Let pages of a tensor that was read leave this process; they stay in the page cache."""
        for spec in _parts(self.spec(key)):
            self.open_file(spec.region.file).release(spec.region)

    def slice(self, key: str) -> TensorSlice:
        """A tensor to be indexed before it is read: ``checkpoint.slice(key)[a:b]``."""
        return TensorSlice(self, self.spec(key))

    def open_file(self, path: str) -> MappedFile:
        """One of the files, mapped. Mapped once, however often it is asked for."""
        file = self._open_files.get(path)
        if file is None:
            from fastload.storage.mapping import MappedFile

            mapped = MappedFile(path, self._n_file_bytes[path], self._modified_ns[path], self._descriptors.get(path))
            file = self._open_files.setdefault(path, mapped)
        return file

    def descriptor(self, path: str) -> int | None:
        """One of the files, open for as long as this object lives; None where too many files were open."""
        return self._descriptors.get(path)

    def held_path(self, path: str) -> str:
        """A path to one of the files for as long as this object lives, whatever its name comes to mean.

        For those who open it for themselves, more than once or in their own way.
        """
        by_number = f"/proc/self/fd/{self._descriptors.get(path)}"
        return by_number if os.path.exists(by_number) else path

    def read_ahead(
        self,
        specs: Iterable[TensorSpec] | None = None,
        *,
        in_file_order: bool = False,
        nothing_between: bool = False,
    ) -> Prefetch | None:
        """Read what is cold in the background, in the order in which a model will use it. None if all is warm.

        What is done is added to the notes. Files that are being read ahead already are joined.

        Args:
            specs: what to read; None for all tensors.
            in_file_order: all of the files, from their beginnings.
            nothing_between: leave out what lies between these tensors, however little it is.
        """
        wanted = chain.from_iterable(map(_parts, map(self.spec, self))) if specs is None else specs
        reading = read_ahead(
            self.files,
            () if in_file_order else wanted,
            descriptors=self._descriptors,
            nothing_between=nothing_between,
        )
        if reading is not None:
            self.notes = (*self.notes, reading.note)
        return reading

    def verify(self) -> None:
        """Compare all bytes of the files with the checksums that were written with them.

        Those are fastload's in safetensors headers and in the index; where there are none, the SHA-256 that is a file's
        name in a download cache of the hub, or those of a .bin's entries.

        Raises:
            IntegrityError: they differ. File, key and the bytes of the file are told.
            ArchiveError: an entry of a .bin is damaged.
            OptionError: there is nothing to compare with.
        """
        from fastload.integrity import require_integrity

        if self.format == "dcp":
            raise OptionError(
                "a folder of torch.distributed.checkpoint has no checksums to be compared with",
                file=os.path.dirname(self.files[0]) if self.files else None,
                fix="leave out verify, or convert it to safetensors ('fastload convert DIR OUT')",
            )
        require_integrity(self.files, self._checksums)

    def n_file_bytes(self, path: str) -> int:
        """Size of one of the files when its header was read."""
        return self._n_file_bytes[path]

    def modified_ns(self, path: str) -> int | None:
        """When one of the files was modified last, as it said when its header was read."""
        return self._modified_ns[path]

    def _assembled(self, spec: FusedSpec) -> torch.Tensor:
        import torch

        from fastload.dtypes import to_torch
        from fastload.storage.assembling import assemble

        tensor = torch.empty(spec.shape, dtype=to_torch(spec.dtype), device="cpu")
        assemble(tensor, spec, self.open_file)
        return tensor

    def _add(
        self, specs: tuple[TensorSpec, ...], path: str, weight_map: Mapping[str, str] | None, tolerant: bool
    ) -> None:
        new = {spec.key: spec for spec in specs}
        if len(new) == len(specs) and new.keys().isdisjoint(self.specs):
            self.specs.update(new)
            return
        for spec in specs:
            known = self.specs.setdefault(spec.key, spec)
            if known is spec:
                continue
            owner = (weight_map or {}).get(spec.key, path if tolerant else None)
            if owner not in (known.region.file, path):
                raise FormatError(
                    "a tensor is in two files, and the index does not say which one counts",
                    file=path,
                    key=spec.key,
                    expected="every key in one file",
                    found=f"also in {known.region.file}",
                    fix="delete the file that belongs to an earlier save",
                )
            if owner == path:
                self.specs[spec.key] = spec

    def _check_index(self, files: CheckpointFiles) -> None:
        lost = [key for key in files.weight_map or () if key not in self.specs]
        if lost:
            raise IndexFileError(
                "the index lists tensors that no file holds",
                file=files.index,
                key=", ".join(collapse_keys(lost)),
                expected=f"each in the file that the index gives for it ({len(files.weights)} files were read)",
                found=f"{len(lost)} keys in none",
                fix="fetch or save the checkpoint again; one of its files belongs to another save",
            )


def _parts(spec: TensorSpec | FusedSpec) -> list[TensorSpec]:
    return [piece.spec for piece in spec.pieces] if isinstance(spec, FusedSpec) else [spec]


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


class TensorSlice:
    """One tensor of a checkpoint, whose parts can be asked for.

    Attributes:
        shape: its shape.
        dtype: safetensors' code of its type, such as ``"F32"``.
    """

    __slots__ = ("_checkpoint", "_spec", "dtype", "shape")

    def __init__(self, checkpoint: Checkpoint, spec: TensorSpec | FusedSpec) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self.shape = spec.shape
        self.dtype = spec.dtype.code

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._checkpoint[self._spec.key][index]


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    subfolder: str = "",
    use_safetensors: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Checkpoint:
    """Open a folder, one weight file, an index, or a repository of a model hub.

    Only headers are read. Raises CheckpointNotFoundError where there are no weights, FormatError where a file is not
    what it should be.
    """
    files = FileOptions(variant=variant, subfolder=subfolder, use_safetensors=use_safetensors)
    hub = HubOptions(
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    return read_steadily(path, lambda: Checkpoint(locate_checkpoint(os.fspath(path), files, hub)), subfolder=subfolder)
