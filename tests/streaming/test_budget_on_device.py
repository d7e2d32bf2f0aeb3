"""A model larger than the memory of an accelerator, on the CPU implementation of the device interface."""

from __future__ import annotations

import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastload
from fastload.checkpoint import open_checkpoint
from fastload.dtypes import from_torch
from fastload.errors import BlockError
from fastload.filling import fill_module
from fastload.options import LoadOptions
from fastload.placement.device_map import remainder_as_budget
from fastload.reports import Stopwatch
from fastload.storage.cpu_device import CpuDevice
from tests.cold import wait_for_no_threads
from tests.conftest import same_bytes
from tests.staging.devices import CountingDevice
from tests.streaming.stacks import BLOCK_BYTES, N_BLOCKS, Stack, names_on_meta, on_meta, output

REST_BYTES = 30_000
N_STAYING = 2
BUDGET_BYTES = REST_BYTES + (N_STAYING + 2) * BLOCK_BYTES


def device_stack() -> Stack:
    """A stack without a computed buffer, which torch would move to a device that is not there."""
    model = on_meta()
    del model.shift
    model.register_buffer("shift", torch.full((64,), 0.5, device="meta"))
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {key: tensor.clone() for key, tensor in Stack().state_dict().items()}
    save_file(state | {"shift": torch.full((64,), 0.5)}, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def load(path: Path, device: CpuDevice, **options: Any) -> Stack:
    model = device_stack()
    how = LoadOptions(device_map={"": "cuda:0"}, **options)
    fill_module(model, open_checkpoint(path), how, source=str(path), clock=Stopwatch(), devices=lambda name: device)
    return model


def passing() -> set[str]:
    blocks = [f"blocks.{number}." for number in range(N_STAYING, N_BLOCKS)]
    return {name for name in device_stack().state_dict() if name.startswith(tuple(blocks))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as in the files", "cast"])
def test_blocks_beyond_the_budget_come_for_each_forward(path: Path, dtype: torch.dtype) -> None:
    ordinary = device_stack()
    fastload.load_model(ordinary, path, dtype=dtype)
    budget = BUDGET_BYTES * dtype.itemsize // 4
    model = load(path, CountingDevice(), memory_budget_bytes=budget, dtype=from_torch(dtype))
    for _ in range(3):
        assert names_on_meta(model) == passing()
        assert same_bytes(output(model), output(ordinary))


def test_the_next_block_is_on_its_way_while_one_computes(path: Path) -> None:
    device = CountingDevice()
    model = load(path, device, memory_budget_bytes=BUDGET_BYTES)
    seen: list[int] = []
    for block in model.blocks:
        # Registered behind the hook that brings the block.
        block.register_forward_pre_hook(lambda module, args: seen.append(sum(device.allocated)))
    before = sum(device.allocated)
    output(model)
    # Two blocks are under way from the load on; each that passes begins another, the last the first ones again.
    began = [round((now - before) / BLOCK_BYTES) for now in seen]
    assert began == [0] * (N_STAYING + 1) + list(range(1, N_BLOCKS - N_STAYING))


def test_a_file_that_was_cut_is_an_error_that_names_the_block(path: Path) -> None:
    model = load(path, CountingDevice(), memory_budget_bytes=BUDGET_BYTES)
    output(model)
    whole = shutil.copy(path, path.with_suffix(".whole"))
    os.truncate(path, 1000)
    with suppress(BlockError):
        output(model)  # the first blocks that pass may have come before the cut
    for _ in range(2):
        with pytest.raises(BlockError) as caught:
            output(model)
        assert caught.value.file == str(path)
        assert str(caught.value.key).startswith("blocks.")
    with path.open("r+b") as file:
        file.write(Path(whole).read_bytes())
    ordinary = device_stack()
    fastload.load_model(ordinary, path)
    assert same_bytes(output(model), output(ordinary))


def test_a_file_that_another_one_replaces_is_read_on(path: Path) -> None:
    model = load(path, CountingDevice(), memory_budget_bytes=BUDGET_BYTES)
    expected = output(model)
    path.unlink()
    state = {key: torch.zeros(tensor.shape) for key, tensor in device_stack().state_dict().items()}
    save_file(state, path, {"format": "pt"})
    for _ in range(2):
        assert same_bytes(output(model), expected)


def test_threads_are_kept_from_block_to_block_and_end_with_the_model(path: Path) -> None:
    model = load(path, CountingDevice(), memory_budget_bytes=BUDGET_BYTES)
    names: list[set[int]] = []
    for _ in range(3):
        output(model)
        readers = [thread for thread in threading.enumerate() if thread.name.startswith("fastload-s")]
        names.append({thread.native_id or 0 for thread in readers})
    assert names[0]
    assert names[0] & names[1] & names[2]
    # Two transfers at a time, each of a sender and its readers.
    assert len(names[-1]) <= 2 * (1 + 12)
    del model, readers
    wait_for_no_threads()


def test_a_model_that_is_dropped_ends_what_is_under_way(path: Path) -> None:
    model = load(path, CountingDevice(), memory_budget_bytes=BUDGET_BYTES)
    del model
    wait_for_no_threads()


def test_the_bytes_are_those_of_the_file(path: Path) -> None:
    model = load(path, CountingDevice(), memory_budget_bytes=BUDGET_BYTES)
    expected = load_file(path)
    seen: dict[str, torch.Tensor] = {}
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(
            lambda module, args, number=number: seen.update(
                {f"blocks.{number}.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
            )
        )
    output(model)
    assert [name for name, tensor in seen.items() if not same_bytes(tensor, expected[name])] == []


def test_what_a_strategy_leaves_beside_one_accelerator_passes_through_it(path: Path) -> None:
    places = {"embed": "cuda:0", "scale": "cuda:0", "shift": "cuda:0", "head": "cuda:0"}
    places |= {f"blocks.{number}": "cuda:0" if number < N_STAYING + 2 else "cpu" for number in range(N_BLOCKS)}
    model = device_stack()
    device_map, budget = remainder_as_budget(model, places, None)
    assert device_map == {"": "cuda:0"}
    in_memory = sum(
        tensor.nbytes for name, tensor in model.state_dict().items() if not name.startswith(("blocks.4.", "blocks.5."))
    )
    assert budget == in_memory
    assert names_on_meta(load(path, CountingDevice(), memory_budget_bytes=budget)) == passing()
    # In half as many bytes, half as many.
    assert remainder_as_budget(model, places, torch.bfloat16)[1] == in_memory // 2


@pytest.mark.parametrize(
    "places",
    [
        {"": "cpu"},
        {"": "cuda:0"},
        {"embed": "cpu", "blocks": "disk"},
        {"embed": "cuda:0", "blocks": "cuda:1", "head": "cpu"},
    ],
    ids=str,
)
def test_other_layouts_stay_as_they_are(places: dict[str, str]) -> None:
    assert remainder_as_budget(device_stack(), places, None) == (places, None)
