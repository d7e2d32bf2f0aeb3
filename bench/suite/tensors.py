"""The ways to get a dict of tensors out of a folder that has one weight file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite import streamers
from suite.checkpoints import weight_files
from suite.loaders import Loader

if TYPE_CHECKING:
    import torch

__all__ = ["TENSOR_LOADERS"]


def _fastload(folder: Path, dtype: torch.dtype | None = None) -> Any:
    import fastload

    return fastload.load_state_dict(folder, dtype=dtype)


def _safetensors(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _torch_load(folder: Path) -> Any:
    import torch

    return torch.load(folder / "pytorch_model.bin", mmap=True, weights_only=True)


def _runai(folder: Path) -> Any:
    return streamers.runai_state(weight_files(folder))


TENSOR_LOADERS = {
    "fastload": Loader("safetensors", _fastload),
    "safetensors": Loader("safetensors", _safetensors),
    "runai streamer": Loader("safetensors", _runai, needs="runai_model_streamer"),
    "fastload .bin": Loader("bin", _fastload),
    "torch.load(mmap)": Loader("bin", _torch_load),
}
