"""Single safetensors files, with the calls of the package safetensors: ``save_file``, ``load_file``, ``safe_open``.

What differs from it: a file is replaced atomically and carries checksums, the header is padded so that tensors of whole
pages begin on one, and errors are fastload's (what safetensors raises as ValueError or RuntimeError is that too).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch

from fastload.checkpoint import Checkpoint
from fastload.errors import KeyMatchError, OptionError, SharedMemoryError
from fastload.options import Durability, FileOptions, parse_durability
from fastload.sources.local import find_weights
from fastload.storable import checked_metadata, checked_tensors
from fastload.storage.atomic import create_temporary, rename, save_error, sync_file, sync_folder
from fastload.storage.sharing import byte_span
from fastload.storage.writing import FileWriter
from fastload.storing import as_safetensors

__all__ = ["load_file", "safe_open", "save_file"]

_FRAMEWORKS = {"pt": "torch", "torch": "torch", "pytorch": "torch", "np": "numpy", "numpy": "numpy"}


def save_file(
    tensors: Mapping[str, torch.Tensor],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    durability: Durability = "full",
) -> None:
    """Save tensors as one safetensors file; whatever happens, the old file or the new one is there.

    Args:
        tensors: dense, contiguous, and each in memory of its own.
        filename: its folder must exist.
        metadata: text for ``__metadata__``, beside ``{"format": "pt"}``.
        durability: what of it shall outlive a power failure (see ``save_state_dict``).

    Raises:
        OptionError: something cannot be saved, or is not contiguous.
        SharedMemoryError: tensors share memory. ``save_state_dict`` stores such tensors once.
        SaveError: tensors are on the meta device, or the operating system refused to write.
    """
    syncs_files, syncs_folder = parse_durability(durability) != "none", durability == "full"
    if not isinstance(tensors, Mapping):
        raise OptionError("tensors are saved by name", expected="a dict of them", found=type(tensors).__name__)
    plain = checked_tensors(tensors)
    _refuse_scattered(plain)
    _refuse_shared(plain)
    content = as_safetensors(plain, {}, checked_metadata(metadata or {}), {})
    shard = content.prepare(list(plain))
    path = os.fspath(filename)
    folder = os.path.dirname(path) or os.curdir
    try:
        descriptor, temporary = create_temporary(folder)
        try:
            with FileWriter(descriptor) as writer:
                shard.write(writer)
                writer.flush()
                if syncs_files:
                    sync_file(writer.sync)
            rename(temporary, path, syncs_files)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise save_error(path, error) from error
    if syncs_folder:
        sync_folder(folder)


def _refuse_scattered(tensors: Mapping[str, torch.Tensor]) -> None:
    scattered = [key for key, tensor in tensors.items() if not tensor.is_contiguous()]
    if scattered:
        raise OptionError(
            "tensors are not contiguous", key=", ".join(scattered), fix="give tensor.contiguous(), or save_state_dict"
        )


def _refuse_shared(tensors: Mapping[str, torch.Tensor]) -> None:
    spans = []
    for key, tensor in tensors.items():
        if tensor.numel():
            storage, (begin, end) = tensor.untyped_storage(), byte_span(tensor)
            spans.append((str(tensor.device), storage.data_ptr() + begin, storage.data_ptr() + end, key))
    spans.sort()
    shared: dict[str, None] = {}
    for (device, _, end, key), (next_device, next_begin, _, next_key) in pairwise(spans):
        if device == next_device and next_begin < end:
            shared |= {key: None, next_key: None}
    if shared:
        raise SharedMemoryError(
            "tensors share memory, and a safetensors file has no way to say so",
            key=", ".join(shared),
            fix="leave out all names but one, clone the tensors, or use save_state_dict, which stores them once",
        )


def load_file(filename: str | os.PathLike[str], device: str | int | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name; on the CPU they are views of the mapped file."""
    with safe_open(filename, framework="pt", device=device) as file:
        return file.get_tensors()


class safe_open:  # noqa: N801  the name that safetensors has for it
    """A safetensors file, whose tensors are made when they are asked for.

    Args:
        filename: the file.
        framework: "pt" for torch's tensors, "np" for numpy's arrays.
        device: where torch's tensors shall be; a number means a CUDA device.

    Raises:
        CheckpointNotFoundError, UnreadableFileError, FormatError: as every reader here.
        OptionError: the framework is none of these.
    """

    def __init__(
        self, filename: str | os.PathLike[str], framework: str = "pt", device: str | int | torch.device = "cpu"
    ) -> None:
        if framework not in _FRAMEWORKS:
            raise OptionError("unknown framework", key="framework", expected="'pt' or 'np'", found=repr(framework))
        self._as_numpy = _FRAMEWORKS[framework] == "numpy"
        self._device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self._path = os.fspath(filename)
        self._checkpoint: Checkpoint | None = Checkpoint(find_weights(self._path, FileOptions(use_safetensors=True)))

    def __enter__(self) -> safe_open:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Tensors that were given out stand on their mapping still.
        self._checkpoint = None

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._opened.specs)

    def offset_keys(self) -> list[str]:
        """The names in the order of the tensors' bytes in the file."""
        specs = self._opened.specs.values()
        return [spec.key for spec in sorted(specs, key=lambda spec: spec.region.offset_bytes)]

    def metadata(self) -> dict[str, str]:
        """The text beside the tensors, without fastload's checksums."""
        return dict(self._opened.metadata)

    def get_tensor(self, name: str) -> Any:
        """One tensor. KeyMatchError if there is none of this name."""
        return self._given(self._mapped(name))

    def get_tensors(self) -> dict[str, Any]:
        """All tensors by name, in the order of the file."""
        return {name: self.get_tensor(name) for name in self.offset_keys()}

    def get_slice(self, name: str) -> _Slice:
        """One tensor, to be indexed before it is read. KeyMatchError if there is none of this name."""
        return _Slice(self, self._mapped(name), self._opened.specs[name].dtype.code)

    @property
    def _opened(self) -> Checkpoint:
        if self._checkpoint is None:
            raise OptionError("the file is closed", file=self._path, fix="use it inside the with block")
        return self._checkpoint

    def _mapped(self, name: str) -> torch.Tensor:
        checkpoint = self._opened
        if name not in checkpoint.specs:
            raise KeyMatchError("the file has no tensor of this name", file=self._path, key=name)
        return checkpoint[name]

    def _given(self, tensor: torch.Tensor) -> Any:
        return tensor.numpy() if self._as_numpy else tensor.to(self._device)


class _Slice:
    """What ``safe_open.get_slice`` gives: indexed, it is that part of the tensor."""

    def __init__(self, file: safe_open, tensor: torch.Tensor, code: str) -> None:
        self._file, self._tensor, self._code = file, tensor, code

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """The format's code of its type, such as ``"F32"``."""
        return self._code

    def __getitem__(self, index: Any) -> Any:
        return self._file._given(self._tensor[index])
