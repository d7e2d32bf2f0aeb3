"""A checkpoint of mixed tensors, and rows that are bound for a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastload.checkpoint import Checkpoint, open_checkpoint
from fastload.placement.device import Staging
from fastload.plan.planning import plan_state_dict
from fastload.plan.staging import Limits
from fastload.storage.devices import Device
from fastload.storage.residency import FileSystem
from fastload.storage.ring import free_pinned_memory
from tests.cold import wait_for_no_threads

PAGE = 4096
LIMITS = Limits(chunk_bytes=16 * PAGE, alone_bytes=32 * PAGE, buffer_bytes=128 * PAGE)


def mixed_tensors() -> dict[str, torch.Tensor]:
    """Tensors of several types, sizes and alignments; about 3 MB."""
    generator = torch.Generator().manual_seed(1)
    made = {f"layers.{i}.weight": torch.randn(120, 100 + i, generator=generator) for i in range(40)}
    made |= {f"layers.{i}.bias": torch.randn(3 + i, generator=generator).bfloat16() for i in range(40)}
    made |= {
        "large": torch.randn(500, 513, generator=generator),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }
    return made | {"ids": torch.arange(1000), "mask": torch.tensor([True, False, True])}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file(mixed_tensors(), tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


@pytest.fixture
def staging_to() -> Callable[..., Staging]:
    """Staging with small chunks to devices under the names that rows may give."""

    def make(*devices: Device, n_slots: int = 4) -> Staging:
        found = {device.name: device for device in devices}
        return Staging(found.get, n_slots * LIMITS.chunk_bytes, LIMITS)

    return make


@pytest.fixture(autouse=True)
def lie_in_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Has all files pass for files of a memory file system, or for none, which they do unless a test says so."""

    def lie(do: bool) -> None:
        found = FileSystem("tmpfs" if do else "ext4", False)
        monkeypatch.setattr("fastload.storage.windows.file_system", lambda file: found)

    lie(False)
    return lie


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Threads have ended after every test, and pinned memory can be given back."""
    yield
    wait_for_no_threads()
    free_pinned_memory()


def rows_of(checkpoint: Checkpoint, name: str = "cuda:0") -> list:  # type: ignore[type-arg]
    """A row for every tensor."""
    return list(plan_state_dict(checkpoint.specs, dtype=None, device=name).rows)
