"""From a device to files, on memory that is reached as a device's is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from fastload.errors import SaveError
from fastload.saver import save_checkpoint
from fastload.storage.ring import free_pinned_memory, kept_pinned_bytes
from fastload.storage.unloading import unload
from tests.cold import threads
from tests.conftest import same_bytes
from tests.staging.devices import CountingDevice, GatedDevice

PIECE_BYTES = 64 << 10


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {f"{i}.weight": torch.randn(100 + i, 1000, generator=generator) for i in range(6)}
    found |= {"turned": found["0.weight"].T, "empty": torch.empty(0, 4), "scalar": torch.tensor(3.0)}
    return found | {"half": torch.randn(70_000, generator=generator).bfloat16(), "part": found["1.weight"][3:9]}


def test_the_pieces_are_the_bytes_of_the_tensors_in_turn() -> None:
    device = CountingDevice()
    made = tensors()
    found = b"".join(bytes(piece) for piece in unload(made.values(), device, PIECE_BYTES))
    assert found == b"".join(tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in made.values())
    assert device.n_pins <= 4
    assert threads() == []


def test_copies_are_under_way_before_a_piece_is_asked_for() -> None:
    device = GatedDevice(n_free=1)
    pieces = unload([torch.arange(100_000)], device, PIECE_BYTES)
    assert bytes(next(pieces)) == torch.arange(PIECE_BYTES // 8).numpy().tobytes()
    assert device.is_held.wait(10)
    device.gate.set()
    pieces.close()
    assert threads() == []


def test_a_reader_that_stops_gives_the_slots_back() -> None:
    free_pinned_memory()
    pieces = unload([torch.arange(100_000)], CountingDevice(), PIECE_BYTES)
    next(pieces)
    pieces.close()
    assert threads() == []
    assert kept_pinned_bytes() == free_pinned_memory() > 0


@pytest.mark.parametrize("max_shard_size", ["5GB", "1MB"])
def test_a_save_from_a_device_has_the_bytes_of_one_from_memory(tmp_path: Path, max_shard_size: str) -> None:
    device = CountingDevice()
    save_checkpoint(tensors(), tmp_path / "memory", max_shard_size=max_shard_size)
    save_checkpoint(tensors(), tmp_path / "device", max_shard_size=max_shard_size, devices=lambda name: device)
    names = sorted(os.listdir(tmp_path / "memory"))
    assert sorted(os.listdir(tmp_path / "device")) == names
    for name in names:
        assert (tmp_path / "device" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    assert device.n_pins > 0
    assert threads() == []


def test_a_save_from_a_device_that_fails_ends_its_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint({"old": torch.ones(3)}, tmp_path)

    def full(descriptor: int, buffers: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(SaveError, match="No space left"):
        save_checkpoint(tensors(), tmp_path, devices=lambda name: CountingDevice())
    monkeypatch.undo()
    assert threads() == []
    from fastload.loader import load_state_dict

    assert same_bytes(load_state_dict(tmp_path)["old"], torch.ones(3))
