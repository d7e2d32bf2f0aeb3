"""stream=True and lazy=True to an accelerator, on the CPU implementation of the device interface."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastload
from fastload.checkpoint import open_checkpoint
from fastload.dtypes import from_torch
from fastload.errors import BlockError, DeviceMemoryError, OptionError
from fastload.filling import fill_module
from fastload.options import LoadOptions
from fastload.reports import LoadReport, Stopwatch
from fastload.storage.cpu_device import CpuDevice
from tests.cold import wait_for_no_threads
from tests.conftest import same_bytes
from tests.staging.devices import CountingDevice, GatedDevice
from tests.streaming.stacks import N_BLOCKS, Stack, n_hooks, names_on_meta, on_meta, output

WAYS = [{"stream": True}, {"lazy": True}]


@pytest.fixture
def path(stack_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(stack_file, tmp_path))


def load(model: nn.Module, path: Path, device: CpuDevice, **options: Any) -> LoadReport:
    """What `fastload.load_model` does, to a device that is reached by staging."""
    # Buffers that are computed are moved by torch, which has no such device here.
    model._buffers.pop("shift", None)
    model.register_buffer("shift", torch.full((64,), 0.5, device="meta"), persistent=True)
    how = LoadOptions(device_map={"": "cuda:0"}, **options)
    checkpoint = open_checkpoint(path)
    return fill_module(model, checkpoint, how, source=str(path), clock=Stopwatch(), devices=lambda name: device)


@pytest.fixture(scope="module")
def stack_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("stack") / "model.safetensors"
    state = {key: tensor.clone() for key, tensor in Stack().state_dict().items()}
    save_file(state | {"shift": torch.full((64,), 0.5)}, path, {"format": "pt"})
    return path


def expected(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {key: tensor.to(dtype) for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as in the files", "cast"])
@pytest.mark.parametrize("way", WAYS, ids=" and ".join)
def test_a_forward_right_after_the_load_is_right(path: Path, way: dict[str, bool], dtype: torch.dtype) -> None:
    ordinary = Stack().to(dtype)
    ordinary.register_buffer("shift", torch.empty(64, dtype=dtype), persistent=True)
    ordinary.load_state_dict(expected(path, dtype))
    model = on_meta()
    load(model, path, CountingDevice(), dtype=from_torch(dtype), **way)
    assert same_bytes(output(model), output(ordinary))
    fastload.wait(model)
    assert names_on_meta(model) == set()
    assert n_hooks(model) == 0
    wait_for_no_threads()
    state = model.state_dict()
    assert [key for key, tensor in expected(path, dtype).items() if not same_bytes(state[key], tensor)] == []


def test_a_forward_waits_for_its_own_block_only(path: Path) -> None:
    device = GatedDevice(n_free=4)
    model = on_meta()
    load(model, path, device, stream=True)
    hidden = model.blocks[0](model.embed(torch.arange(6)))
    assert not hidden.isnan().any()
    done = threading.Event()
    found: list[torch.Tensor] = []

    def last() -> None:
        found.append(model.blocks[N_BLOCKS - 1](hidden))
        done.set()

    thread = threading.Thread(target=last)
    thread.start()
    assert not done.wait(0.2)
    device.gate.set()
    thread.join()
    fastload.wait(model)
    assert torch.equal(found[0], model.blocks[N_BLOCKS - 1](hidden))


def test_the_report_tells_of_the_transfer(path: Path) -> None:
    model = on_meta()
    report = load(model, path, CountingDevice(), stream=True)
    fastload.wait(model)
    assert any(note.startswith("to cuda:0 by ") for note in report.notes)


class CuttingDevice(CountingDevice):
    """Its second allocation, which is that of the stream, comes with a file that is cut."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._n_calls = 0

    def allocate(self, sizes: list[int]) -> list[torch.Tensor]:  # type: ignore[override]
        self._n_calls += 1
        if self._n_calls == 2:
            os.truncate(self._path, self._path.stat().st_size // 2)
        return super().allocate(sizes)


@pytest.mark.parametrize("way", WAYS, ids=" and ".join)
def test_a_file_that_was_cut_is_told_by_forward_and_wait(path: Path, way: dict[str, bool]) -> None:
    model = on_meta()
    load(model, path, CuttingDevice(path), **way)
    for use in (output, fastload.wait):
        with pytest.raises(BlockError) as caught:
            use(model)
        assert caught.value.file == str(path)
        assert caught.value.key
    wait_for_no_threads()


def test_a_model_that_is_dropped_ends_its_transfer(path: Path) -> None:
    model = on_meta()
    load(model, path, CountingDevice(), stream=True)
    del model
    wait_for_no_threads()


def test_too_little_memory_on_the_device_is_told_by_the_load(path: Path) -> None:
    model = on_meta()
    with pytest.raises(DeviceMemoryError) as caught:
        load(model, path, CountingDevice(capacity_bytes=100_000), stream=True)
    assert "cuda:0" in str(caught.value)
    wait_for_no_threads()


@pytest.mark.parametrize("way", WAYS, ids=" and ".join)
def test_several_devices_and_later_exclude_each_other(path: Path, way: dict[str, bool]) -> None:
    model = on_meta()
    how = LoadOptions(device_map={"": "cuda:0", "blocks.0": "cuda:1"}, **way)  # type: ignore[arg-type]
    model._buffers.pop("shift")
    with pytest.raises(OptionError, match="several devices") as caught:
        fill_module(
            model,
            open_checkpoint(path),
            how,
            source=str(path),
            clock=Stopwatch(),
            devices=lambda name: CountingDevice(name),
        )
    assert "cuda:1" in str(caught.value)
