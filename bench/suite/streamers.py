"""Packages that stream weights, each as its documentation recommends it for one machine without a GPU.

They are optional; what is missing is left out of the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["fastsafetensors_state", "runai_state", "tensorizer_fill", "tensorizer_write"]


def fastsafetensors_state(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """All tensors through fastsafetensors, without GPUDirect Storage. They outlive its context."""
    from fastsafetensors import fastsafe_open

    with fastsafe_open([str(path) for path in files], device="cpu", nogds=True) as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no mapping


def runai_state(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """All tensors through runai-model-streamer, which gives them away to keep."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in files])
        return dict(streamer.get_tensors())


def tensorizer_write(model: Any, file: Path) -> None:
    """A module in tensorizer's own format, which is the only one that it loads."""
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(file))
    serializer.write_module(model, include_non_persistent_buffers=False)
    serializer.close()


def tensorizer_fill(model: Any, file: Path) -> None:
    """Fill a module from tensorizer's own format."""
    from tensorizer import TensorDeserializer

    with TensorDeserializer(str(file), device="cpu") as deserializer:
        deserializer.load_into_module(model)
