"""save_file, load_file and safe_open: what the same calls of safetensors do, with its files and with ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch as official
import torch

import fastload
from fastload.errors import (
    CheckpointNotFoundError,
    FastloadError,
    HeaderError,
    KeyMatchError,
    OptionError,
    SaveError,
    SharedMemoryError,
    TruncatedFileError,
)
from tests.conftest import same_bytes

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip
SAVERS: list[Callable[..., None]] = [fastload.save_file, official.save_file]
LOADERS: list[Callable[..., Any]] = [fastload.load_file, official.load_file]


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(same_bytes(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("load", LOADERS, ids=["fastload reads", "safetensors reads"])
@pytest.mark.parametrize("save", SAVERS, ids=["fastload writes", "safetensors writes"])
def test_every_type_comes_back(tmp_path: Path, save: Callable[..., None], load: Callable[..., Any]) -> None:
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    save(tensors, tmp_path / "t.safetensors")
    assert same(load(tmp_path / "t.safetensors"), tensors)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (5, 7), (1, 2, 3, 4, 5, 6, 7)], ids=str)
def test_every_shape_comes_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"t": torch.randn(shape)}
    fastload.save_file(tensors, tmp_path / "t.safetensors")
    for load in LOADERS:
        assert same(load(tmp_path / "t.safetensors"), tensors)


def test_four_bit_floats_come_back(tmp_path: Path) -> None:
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no 4-bit floats")
    tensors = {"t": torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2)}
    fastload.save_file(tensors, tmp_path / "t.safetensors")
    assert same(fastload.load_file(tmp_path / "t.safetensors"), tensors)


def test_no_tensors_are_a_file(tmp_path: Path) -> None:
    fastload.save_file({}, tmp_path / "t.safetensors")
    assert [load(tmp_path / "t.safetensors") for load in LOADERS] == [{}, {}]


def test_two_saves_are_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3) for name in "cab"}
    fastload.save_file(tensors, tmp_path / "1")
    fastload.save_file(dict(sorted(tensors.items())), tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_metadata_is_kept(tmp_path: Path) -> None:
    fastload.save_file({"t": torch.ones(1)}, tmp_path / "t.safetensors", {"step": "7", "ü": '"\n'})
    with fastload.safe_open(tmp_path / "t.safetensors") as file:
        assert file.metadata() == {"format": "pt", "step": "7", "ü": '"\n'}
    with safetensors.safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert {"step": "7", "ü": '"\n'}.items() <= file.metadata().items()


def test_parameters_are_saved_by_value(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 3)
    fastload.save_file(dict(layer.named_parameters()), tmp_path / "t.safetensors")
    assert same(official.load_file(tmp_path / "t.safetensors"), layer.state_dict())


def test_parts_of_one_buffer_that_do_not_overlap_are_saved(tmp_path: Path) -> None:
    buffer = torch.arange(10.0)
    tensors = {"a": buffer[:4], "b": buffer[4:]}
    for save in SAVERS:
        save(tensors, tmp_path / "t.safetensors")
        assert same(fastload.load_file(tmp_path / "t.safetensors"), tensors)


@pytest.mark.parametrize(
    "make",
    [lambda t: {"a": t, "b": t}, lambda t: {"a": t, "b": t[2:]}, lambda t: {"a": t, "b": t.view(torch.int32)}],
    ids=["the same", "a part", "as another type"],
)
def test_shared_memory_is_refused_as_by_safetensors(tmp_path: Path, make: Callable[..., Any]) -> None:
    for save in SAVERS:
        with pytest.raises(RuntimeError):
            save(make(torch.ones(8)), tmp_path / "t.safetensors")
    with pytest.raises(SharedMemoryError) as caught:
        fastload.save_file(make(torch.ones(8)), tmp_path / "t.safetensors")
    assert caught.value.key == "a, b"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "tensors",
    [
        {"t": torch.ones(2, 3).t()},
        {"t": torch.ones(4)[::2]},
        {"t": torch.ones(2, 2).to_sparse()},
        {"t": [1.0]},
        {"t": np.ones(2)},
        [torch.ones(1)],
    ],
    ids=["transposed", "strided", "sparse", "a list", "an array", "no names"],
)
def test_what_safetensors_refuses_is_refused(tmp_path: Path, tensors: Any) -> None:
    for save in SAVERS:
        with pytest.raises(ValueError):
            save(tensors, tmp_path / "t.safetensors")
    assert os.listdir(tmp_path) == []


def test_tensor_on_meta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="meta device"):
        fastload.save_file({"t": torch.ones(1, device="meta")}, tmp_path / "t.safetensors")


def test_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="No such file"):
        fastload.save_file({"t": torch.ones(1)}, tmp_path / "missing" / "t.safetensors")


def test_file_that_its_tensors_are_mapped_from_is_saved_to(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    fastload.save_file({"t": torch.arange(5000.0)}, path)
    tensors = fastload.load_file(path)
    tensors["t"] += 1
    fastload.save_file(tensors, path)
    assert same(official.load_file(path), {"t": torch.arange(5000.0) + 1})


def test_changes_to_loaded_tensors_do_not_reach_the_file(tmp_path: Path) -> None:
    fastload.save_file({"t": torch.zeros(5)}, tmp_path / "t.safetensors")
    fastload.load_file(tmp_path / "t.safetensors")["t"].fill_(1)
    assert same(fastload.load_file(tmp_path / "t.safetensors"), {"t": torch.zeros(5)})


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda data: b"", TruncatedFileError),
        (lambda data: data[:-1], TruncatedFileError),
        (lambda data: data + b"\0", HeaderError),
        (lambda data: (1 << 40).to_bytes(8, "little") + data[8:], HeaderError),
        (lambda data: data.replace(b'"F32"', b'"F99"'), FastloadError),
        (lambda data: data[:8] + b"x" + data[9:], HeaderError),
    ],
    ids=["empty", "cut", "longer", "header too long", "unknown type", "no JSON"],
)
def test_damaged_file_is_refused_as_by_safetensors(
    tmp_path: Path, damage: Callable[[bytes], bytes], error: type[Exception]
) -> None:
    path = tmp_path / "t.safetensors"
    official.save_file({"t": torch.ones(4)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(safetensors.SafetensorError):
        official.load_file(path)
    with pytest.raises(error):
        fastload.load_file(path)


def test_missing_file_is_told(tmp_path: Path) -> None:
    for load in LOADERS:
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "t.safetensors")
    with pytest.raises(CheckpointNotFoundError):
        fastload.load_file(tmp_path / "t.safetensors")


# safe_open


@pytest.fixture
def path(tmp_path: Path) -> Path:
    official.save_file(
        {"b": torch.arange(24.0).reshape(4, 6), "a": torch.arange(5), "h": torch.ones(2, 2).half()},
        tmp_path / "t.safetensors",
        {"who": "me"},
    )
    return tmp_path / "t.safetensors"


def test_opened_file_tells_what_safetensors_does(path: Path) -> None:
    with fastload.safe_open(path, framework="pt", device="cpu") as ours, safetensors.safe_open(path, "pt") as theirs:
        assert ours.keys() == theirs.keys()
        assert ours.offset_keys() == theirs.offset_keys()
        assert ours.metadata() == theirs.metadata()
        for key in theirs.offset_keys():
            assert same_bytes(ours.get_tensor(key), theirs.get_tensor(key))
            assert ours.get_slice(key).get_shape() == theirs.get_slice(key).get_shape()
            assert ours.get_slice(key).get_dtype() == theirs.get_slice(key).get_dtype()
        assert same(ours.get_tensors(), {key: theirs.get_tensor(key) for key in theirs.offset_keys()})


@pytest.mark.parametrize(
    "index",
    [
        np.s_[:], np.s_[...], np.s_[1], np.s_[1:3], np.s_[:, 2:4], np.s_[:, ::1], np.s_[2, 1:], np.s_[:2, :3],
        np.s_[0:0], np.s_[-2:], np.s_[:, -1],
    ],
    ids=str,
)  # fmt: skip
def test_slices_are_those_of_safetensors(path: Path, index: Any) -> None:
    with fastload.safe_open(path) as ours, safetensors.safe_open(path, "pt") as theirs:
        assert same_bytes(ours.get_slice("b")[index], theirs.get_slice("b")[index])


def test_arrays_of_numpy_are_given_on_request(path: Path) -> None:
    with fastload.safe_open(path, framework="np") as ours, safetensors.safe_open(path, "np") as theirs:
        for key in ours.keys():  # noqa: SIM118  a file is no mapping
            np.testing.assert_array_equal(ours.get_tensor(key), theirs.get_tensor(key), strict=True)
        np.testing.assert_array_equal(ours.get_slice("b")[1:], theirs.get_slice("b")[1:], strict=True)


def test_tensors_outlive_the_file(path: Path) -> None:
    with fastload.safe_open(path) as file:
        tensor = file.get_tensor("b")
    path.unlink()
    assert same_bytes(tensor, torch.arange(24.0).reshape(4, 6))


def test_name_that_is_not_there_is_told(path: Path) -> None:
    with fastload.safe_open(path) as file:
        for get in (file.get_tensor, file.get_slice):
            with pytest.raises(KeyMatchError, match="no tensor of this name"):
                get("c")


def test_closed_file_gives_nothing(path: Path) -> None:
    with fastload.safe_open(path) as file:
        pass
    with pytest.raises(OptionError, match="the file is closed"):
        file.keys()


def test_unknown_framework_is_refused(path: Path) -> None:
    with pytest.raises(OptionError, match="unknown framework"):
        fastload.safe_open(path, framework="tf")
