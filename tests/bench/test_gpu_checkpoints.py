"""Checkpoints that are written without a model: real files, random weights, the shapes that are said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_suite.checkpoints import FULL, SMALL, Shape, make
from safetensors.torch import load_file
from suite.checkpoints import weight_files

import fastload


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in weight_files(folder) for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_a_model_is_filled_by_it_and_gives_finite_outputs(shape: Shape, tmp_path: Path) -> None:
    make(tmp_path / "made", shape)
    model = fastload.AutoModelForCausalLM.from_pretrained(tmp_path / "made", strict=True)
    with torch.inference_mode():
        logits = model(torch.arange(12).unsqueeze(0)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_the_official_reader_finds_the_tensors_that_are_said(shape: Shape, tmp_path: Path) -> None:
    make(tmp_path / "made", shape)
    tensors = _tensors(tmp_path / "made")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shape.tensors()
    assert len(tensors) == shape.n_tensors
    assert sum(tensor.nbytes for tensor in tensors.values()) == shape.n_bytes
    assert {tensor.dtype for tensor in tensors.values()} == {
        {"BF16": torch.bfloat16, "F32": torch.float32}[shape.dtype]
    }
    assert len(weight_files(tmp_path / "made")) == shape.n_shards


def test_no_part_of_a_large_file_is_zeros_or_as_another(tmp_path: Path) -> None:
    make(tmp_path / "made", replace(SMALL["dense"], vocabulary=300_000, n_layers=1, n_shards=1))
    table = _tensors(tmp_path / "made")["model.embed_tokens.weight"].flatten()
    # A block of the writer's is 8 Mi values; the table has two, wherever in the file it begins.
    blocks = table[: 16 << 20].view(torch.int16).unflatten(0, (2, -1))
    assert (blocks != 0).float().mean() > 0.99
    assert (blocks[0] == blocks[1]).float().mean() < 0.1
    assert table.isfinite().all()


def test_it_is_made_once_and_made_anew_when_the_shape_is_another(tmp_path: Path) -> None:
    make(tmp_path, SMALL["dense"])
    first = weight_files(tmp_path)[0].stat().st_ino
    make(tmp_path, SMALL["dense"])
    assert weight_files(tmp_path)[0].stat().st_ino == first
    make(tmp_path, SMALL["less"])
    assert set(_tensors(tmp_path)) == set(SMALL["less"].tensors())


def test_one_that_was_half_made_is_made_anew(tmp_path: Path) -> None:
    make(tmp_path, SMALL["dense"])
    (tmp_path / "config.json").unlink()  # it is written last
    weight_files(tmp_path)[0].write_bytes(b"half")
    make(tmp_path, SMALL["dense"])
    assert set(_tensors(tmp_path)) == set(SMALL["dense"].tensors())


def test_too_little_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"has room for .* and dense needs .*: name another --folder"):
        make(tmp_path / "made", replace(SMALL["dense"], vocabulary=10**12))
    assert list((tmp_path / "made").iterdir()) == []


def test_the_full_shapes_are_those_that_were_promised() -> None:
    assert 16.0e9 < FULL["dense"].n_bytes < 16.1e9
    assert FULL["dense"].n_shards == 4
    assert FULL["moe"].n_tensors == len(FULL["moe"].tensors()) == 20_046
    assert FULL["fp32"].dtype == "F32"
