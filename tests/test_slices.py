"""Parts whose rows lie apart in the files: read by their runs, warm or cold, mapped or over a network."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastload
from fastload.checkpoint import Checkpoint
from fastload.dtypes import DTYPES
from fastload.placement import slices
from fastload.placement.cpu import place
from fastload.placement.slices import place_slices, use_where_they_lie
from fastload.plan.boxes import Box, narrow
from fastload.plan.keys import KeyMatch
from fastload.plan.rows import Action, LoadPlan, PlanRow
from fastload.storage.memory import private_bytes
from fastload.storage.reading import ReadFile
from fastload.storage.residency import residency
from tests.cold import make_cold, resident, wait_for_no_threads
from tests.conftest import same_bytes

SHAPE = (512, 16384)  # 32 MB in rows of 64 kB
COLUMNS = Box((0, 4096), (512, 4096))


@pytest.fixture(scope="module")
def tensor() -> torch.Tensor:
    return torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.int32).view(torch.float32).view(SHAPE)


@pytest.fixture
def checkpoint(tensor: torch.Tensor, tmp_path: Path) -> Checkpoint:
    save_file({"weight": tensor}, tmp_path / "model.safetensors")
    return fastload.open_checkpoint(tmp_path)


def columns(checkpoint: Checkpoint, dtype: str = "F32", device: str = "cpu", box: Box = COLUMNS) -> LoadPlan:
    row = PlanRow("weight", narrow(checkpoint.specs["weight"], box), DTYPES[dtype], device, Action.SLICE)
    return LoadPlan((row,), KeyMatch({}, (), (), ()))


def opened(checkpoint: Checkpoint, path: str) -> ReadFile:
    return ReadFile(path, checkpoint.n_file_bytes(path))


@pytest.mark.parametrize("is_cold", [True, False])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_columns_are_those_of_the_whole(
    checkpoint: Checkpoint, tensor: torch.Tensor, dtype: str, is_cold: bool
) -> None:
    if is_cold:
        make_cold(checkpoint.files[0])
    placed, notes = place_slices(columns(checkpoint, dtype).rows, checkpoint.open_file, {})
    expected = tensor[:, 4096:8192].to(placed["weight"].dtype)
    assert same_bytes(placed["weight"], expected)
    assert placed["weight"].untyped_storage().nbytes() == expected.nbytes
    assert bool(notes) == is_cold


def in_place(checkpoint: Checkpoint, plan: LoadPlan) -> bool:
    return use_where_they_lie(plan, checkpoint).rows[0].action is Action.STRIDE


def test_columns_of_a_warm_file_are_used_where_they_lie(checkpoint: Checkpoint, tensor: torch.Tensor) -> None:
    plan = use_where_they_lie(columns(checkpoint), checkpoint)
    before = private_bytes() or 0
    placed = place(plan, checkpoint.open_file)["weight"]
    assert (private_bytes() or 0) - before < 1 << 20
    assert same_bytes(placed, tensor[:, 4096:8192])
    assert placed.stride() == (16384, 1)
    assert plan.bytes_by_action() == {"stride": 512 * 4096 * 4}
    inputs = torch.randn(3, 4096)
    assert torch.equal(inputs @ placed.T, inputs @ placed.contiguous().T)


def test_columns_are_used_where_they_lie_though_some_pages_are_missing(
    checkpoint: Checkpoint, tensor: torch.Tensor
) -> None:
    (path,) = checkpoint.files
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 20 << 20, 1 << 20, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    plan = use_where_they_lie(columns(checkpoint), checkpoint)
    assert plan.rows[0].action is Action.STRIDE
    assert same_bytes(place(plan, checkpoint.open_file)["weight"], tensor[:, 4096:8192])


def test_columns_are_copied_where_the_file_is_cold(checkpoint: Checkpoint) -> None:
    make_cold(checkpoint.files[0])
    assert not in_place(checkpoint, columns(checkpoint))


@pytest.mark.parametrize(
    "how", [{"dtype": "BF16"}, {"device": "meta"}, {"device": ""}, {"box": Box((0, 4096), (512, 511))}]
)
def test_columns_that_are_converted_moved_filled_or_short_are_copied(checkpoint: Checkpoint, how: Any) -> None:
    assert in_place(checkpoint, columns(checkpoint))
    assert not in_place(checkpoint, columns(checkpoint, **how))


def test_detached_columns_have_memory_of_their_own_size(checkpoint: Checkpoint, tensor: torch.Tensor) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(
        place(use_where_they_lie(columns(checkpoint), checkpoint), checkpoint.open_file)["weight"]
    )
    assert fastload.detach(module) == 512 * 4096 * 4
    assert module.weight.is_contiguous()
    assert module.weight.untyped_storage().nbytes() == 512 * 4096 * 4
    assert same_bytes(module.weight, tensor[:, 4096:8192])


def test_columns_fill_memory_that_is_there(checkpoint: Checkpoint, tensor: torch.Tensor) -> None:
    given = torch.zeros(512, 4096)
    placed, _ = place_slices(columns(checkpoint, device="").rows, checkpoint.open_file, {"weight": given})
    assert placed["weight"] is given
    assert same_bytes(given, tensor[:, 4096:8192])


def test_of_a_cold_file_only_the_rows_are_read(checkpoint: Checkpoint) -> None:
    (path,) = checkpoint.files
    make_cold(path)
    n_before = resident(path)
    place_slices(columns(checkpoint).rows, checkpoint.open_file, {})
    n_bytes = 512 * 4096 * 4
    # A run begins and ends within a page, and whether a file is cold is found out by looking at 64 of its pages.
    assert n_bytes <= resident(path) - n_before <= 1.6 * n_bytes
    assert resident(path) < 0.45 * os.path.getsize(path)


def test_over_a_network_only_the_rows_are_read(checkpoint: Checkpoint, tensor: torch.Tensor) -> None:
    (path,) = checkpoint.files
    make_cold(path)
    placed, _ = place_slices(columns(checkpoint).rows, lambda path: opened(checkpoint, path), {})
    assert resident(path) < 0.45 * os.path.getsize(path)
    assert same_bytes(placed["weight"], tensor[:, 4096:8192])
    with open("/proc/self/maps") as maps:
        assert path not in maps.read()


@pytest.mark.parametrize("is_read", [True, False])
def test_blocks_are_put_together(
    checkpoint: Checkpoint, tensor: torch.Tensor, is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "_BLOCK_BYTES", 100_000)
    make_cold(checkpoint.files[0])
    open_file = (lambda path: opened(checkpoint, path)) if is_read else checkpoint.open_file
    placed, _ = place_slices(columns(checkpoint, box=Box((7, 1), (501, 11))).rows, open_file, {})
    assert same_bytes(placed["weight"], tensor[7:508, 1:12])
    wait_for_no_threads()


def test_a_file_that_was_cut_is_an_error_over_a_network(checkpoint: Checkpoint) -> None:
    (path,) = checkpoint.files
    file = opened(checkpoint, path)
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(fastload.errors.TruncatedFileError):
        place_slices(columns(checkpoint).rows, lambda path: file, {})
    wait_for_no_threads()


def test_who_looks_second_at_a_cold_file_finds_it_cold(checkpoint: Checkpoint) -> None:
    make_cold(checkpoint.files[0])
    for _ in range(4):
        descriptor = os.open(checkpoint.files[0], os.O_RDONLY)
        assert not residency(descriptor).is_warm
        os.close(descriptor)


def test_a_compressed_part_is_counted_as_what_is_read(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(64, 64)}, tmp_path / "stored.bin")
    with (
        zipfile.ZipFile(tmp_path / "stored.bin") as stored,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    os.remove(tmp_path / "stored.bin")
    checkpoint = fastload.open_checkpoint(tmp_path)
    whole = checkpoint.specs["weight"]
    assert whole.region.encoding is not None
    plan = columns(checkpoint, box=Box((0, 8), (64, 8)))
    assert plan.asked_bytes() == whole.region.encoding.n_bytes < 64 * 8 * 4
    assert plan.n_bytes == 64 * 8 * 4
    placed, notes = place_slices(plan.rows, checkpoint.open_file, {})
    assert same_bytes(placed["weight"], torch.zeros(64, 8))
    assert notes == ()
    with torch.device("meta"):
        module = torch.nn.Linear(64, 64, bias=False)
    assert fastload.load_model(module, tmp_path).n_read_bytes == whole.region.encoding.n_bytes
