"""Where the weights of a load come from: files, or a state dict that the caller has in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from fastload.checkpoint import Checkpoint
from fastload.dtypes import from_torch
from fastload.errors import IncompleteModelError
from fastload.formats.index import checked_names
from fastload.formats.runs import Runs
from fastload.formats.specs import Region, StorageView, TensorSpec, contiguous_stride
from fastload.sources.local import CheckpointFiles
from fastload.sources.names import FileFormat
from fastload.storage.mapping import MappedFile

__all__ = ["GivenTensors", "open_files"]


def open_files(
    files: Sequence[str], weight_map: Mapping[str, str] | None, checksums: Mapping[str, str] | None = None
) -> Checkpoint:
    """The files that transformers resolved, opened as one checkpoint.

    Args:
        files: paths; those of the index first, in the order of their names, then others.
        weight_map: key -> name of its file, where there is an index.
        checksums: name of a file -> checksum of its header, where the index has them.

    Raises:
        IndexFileError: the index leaves its folder. transformers follows it wherever it leads.
        FormatError: a file is not what it should be.
    """
    owners, headers = None, {}
    if weight_map is not None:
        names = checked_names(dict(weight_map), os.path.dirname(files[0]))
        path_of = dict(zip(sorted(names), files, strict=False))
        owners = {key: path_of[name] for key, name in weight_map.items()}
        headers = {path_of[name]: value for name, value in (checksums or {}).items() if name in path_of}
    form: FileFormat = "safetensors" if files[0].endswith(".safetensors") else "bin"
    found = CheckpointFiles(os.path.dirname(files[0]), form, tuple(files), weight_map=owners, checksums=headers)
    return Checkpoint(found, tolerant=True)


class GivenTensors(MappedFile):
    """A state dict with the face of a mapped file: its tensors are used as they are, and shared with the caller.

    Attributes:
        specs: its tensors by key.
        others: keys of what is no tensor.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path = "the state dict"
        self._tensors = tensors
        # The offsets only tell the tensors apart; that they are views tells that no part has an offset of its own.
        self.specs = {
            key: TensorSpec(
                key,
                from_torch(tensor.dtype),
                tuple(tensor.shape),
                Region(self.path, at, tensor.nbytes),
                StorageView(0, contiguous_stride(tuple(tensor.shape))),
            )
            for at, (key, tensor) in enumerate(tensors.items())
            if isinstance(tensor, torch.Tensor)
        }
        self.others = tuple(key for key in tensors if key not in self.specs)

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """The caller's tensor, as a view. Raises IncompleteModelError where it is on meta."""
        tensor = self._tensors[spec.key]
        if tensor.is_meta:
            raise IncompleteModelError(
                "a tensor of the state dict has no values", key=spec.key, expected="values", found="a tensor on meta"
            )
        return tensor[...]

    def tensors(self, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
        """The caller's tensors, as views."""
        return [self.tensor(spec) for spec in specs]

    def is_warm(self) -> bool:
        """Yes: the tensors are in memory."""
        return True

    def ask_for(self, runs: Runs) -> None:
        """Nothing: there is no file."""

    def release(self, region: Region) -> None:
        """Nothing: the tensors are the caller's."""

    def check(self) -> None:
        """Nothing: there is no file."""

    def stop_reading_around(self) -> None:
        """Nothing: there is no mapping."""
