"""Fixtures that several rooms share: small real modules, and checkpoints written by the official libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """A state dict with the shapes that trip readers: a matrix, a scalar, an empty tensor, several types."""
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(8, 4, generator=generator),
        "layer.bias": torch.randn(8, generator=generator),
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "count": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
    }


@pytest.fixture
def write_safetensors(tmp_path: Path) -> Callable[..., Path]:
    """Writes model.safetensors with the official library into a fresh folder and returns the folder."""

    def write(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata or {"format": "pt"})
        return folder

    return write


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, type and every byte, so that NaN and 8-bit floats count too."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat_a, flat_b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(flat_a, flat_b)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a CUDA device are skipped, with the reason, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


def without_checksums(metadata: dict[str, Any]) -> dict[str, Any]:
    """What a header or an index says beside the checksums, which there must be."""
    rest = dict(metadata)
    assert rest.pop("fastload.checksums")
    return rest
