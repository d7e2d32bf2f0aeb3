"""Saving: shards that the caller divides, tensors that are loaded when they are written, files written side by side."""

from __future__ import annotations

import json
import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastload.errors import OptionError, SaveError
from fastload.loader import load_state_dict
from fastload.saver import save_checkpoint, save_state_dict
from fastload.storage.memory import private_bytes
from tests.conftest import same_bytes, without_checksums

FORMATS = pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.full((100,), float(value)) for name in "abcd"}


@FORMATS
def test_shards_are_divided_as_the_caller_says(tmp_path: Path, safe: bool) -> None:
    shards = [["d.weight", "a.weight", "b.weight"], ["c.weight"]]
    save_checkpoint(weights(), tmp_path, shards=shards, n_parameters=7, safe_serialization=safe)
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    index = json.loads((tmp_path / f"{stem}.{suffix}.index.json").read_text())
    metadata = without_checksums(index["metadata"]) if safe else index["metadata"]
    assert metadata == {"total_parameters": 7, "total_size": 1600}
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    assert index["weight_map"] == {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    assert load_state_dict(tmp_path).keys() == weights().keys()


@pytest.mark.parametrize(
    "shards",
    [
        [["a.weight", "b.weight"], ["c.weight"]],
        [["a.weight", "b.weight"], ["c.weight", "d.weight", "e.weight"]],
        [["a.weight", "b.weight"], ["b.weight", "c.weight", "d.weight"]],
    ],
    ids=["one is missing", "one is not there", "one is there twice"],
)
def test_division_that_is_none_is_refused(tmp_path: Path, shards: list[list[str]]) -> None:
    with pytest.raises(OptionError, match="not a division"):
        save_checkpoint(weights(), tmp_path / "new", shards=shards)
    assert not (tmp_path / "new").exists()


def test_division_of_tensors_that_share_memory_is_refused_for_bin(tmp_path: Path) -> None:
    base = torch.randn(10)
    with pytest.raises(OptionError, match="not a division"):
        save_checkpoint({"a": base, "b": base}, tmp_path / "new", shards=[["a"], ["b"]], safe_serialization=False)


@FORMATS
@pytest.mark.parametrize("max_shard_size", ["1GB", "800B"])
def test_deferred_tensors_are_loaded_when_they_are_written(tmp_path: Path, safe: bool, max_shard_size: str) -> None:
    values = weights(3) | {"view": torch.arange(12.0).reshape(3, 4).t(), "empty": torch.empty(0, 2)}
    late = ["b.weight", "c.weight", "view", "empty"]
    tensors = values | {key: torch.empty(values[key].shape, device="meta") for key in late}
    loaded: list[str] = []

    def load(key: str) -> torch.Tensor:
        loaded.append(key)
        return values[key]

    deferred = {key: partial(load, key) for key in late}
    save_checkpoint(tensors, tmp_path, deferred=deferred, safe_serialization=safe, max_shard_size=max_shard_size)
    found = load_state_dict(tmp_path)
    assert sorted(loaded) == sorted(late)
    assert found.keys() == values.keys()
    assert all(same_bytes(found[key], tensor) for key, tensor in values.items())


def test_deferred_tensors_are_in_memory_one_at_a_time(tmp_path: Path) -> None:
    if private_bytes() is None:
        pytest.skip("this kernel does not tell the anonymous memory of a process")
    tensors = {f"{i}": torch.empty(4 << 20, dtype=torch.uint8, device="meta") for i in range(32)}
    before, growth = private_bytes() or 0, 0

    def watch(_: int) -> None:
        nonlocal growth
        growth = max(growth, (private_bytes() or 0) - before)

    deferred = {key: lambda: torch.ones(4 << 20, dtype=torch.uint8) for key in tensors}
    save_checkpoint(tensors, tmp_path, deferred=deferred, progress=watch)
    assert growth < 64 << 20  # of 128 MB; an allocator keeps some of what it is given back
    assert all(tensor.all() for tensor in load_file(tmp_path / "model.safetensors").values())


def test_meta_tensors_that_nothing_loads_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {"late": torch.empty(2, device="meta"), "lost": torch.empty(2, device="meta")}
    with pytest.raises(SaveError, match="meta device") as caught:
        save_checkpoint(tensors, tmp_path / "new", deferred={"late": lambda: torch.ones(2)})
    assert caught.value.found == "lost"


@FORMATS
@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(2).half(), torch.empty(2, device="meta")], ids=str)
def test_deferred_tensor_that_is_another_leaves_the_old_checkpoint(
    tmp_path: Path, safe: bool, other: torch.Tensor
) -> None:
    save_state_dict(weights(1), tmp_path)
    tensors = weights(2) | {"late": torch.empty(2, device="meta")}
    with pytest.raises(SaveError, match="is another one") as caught:
        save_checkpoint(tensors, tmp_path, deferred={"late": lambda: other}, safe_serialization=safe)
    assert caught.value.key == "late"
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert same_bytes(load_state_dict(tmp_path)["a.weight"], weights(1)["a.weight"])


def test_extra_files_may_be_bytes(tmp_path: Path) -> None:
    save_checkpoint(weights(), tmp_path, extra_files={"modeling.py": b"# caf\xe9\r\n"})
    assert (tmp_path / "modeling.py").read_bytes() == b"# caf\xe9\r\n"


def test_shards_are_written_side_by_side_and_progress_told_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers, at_once, told = set(), [], threading.Lock()
    writev = os.writev

    def slow(descriptor: int, buffers: list[memoryview]) -> int:
        writers.add(threading.get_ident())
        time.sleep(0.01)
        return writev(descriptor, buffers)

    def progress(_: int) -> None:
        at_once.append(told.acquire(blocking=False))
        time.sleep(0.002)
        told.release()

    monkeypatch.setattr(os, "writev", slow)
    save_checkpoint(weights(5), tmp_path, max_shard_size=400, progress=progress)
    assert 2 < len(writers) <= 4 + 1  # the journal is written by the thread that saves
    assert at_once
    assert all(at_once)
    assert all(same_bytes(tensor, torch.full((100,), 5.0)) for tensor in load_state_dict(tmp_path).values())


def test_failure_in_one_shard_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state_dict(weights(1), tmp_path)
    tensors = {f"{i}": torch.zeros(100 << 20, dtype=torch.uint8) for i in range(8)}
    n_calls, n_written = 0, 0
    writev, lock = os.writev, threading.Lock()

    def failing(descriptor: int, buffers: list[memoryview]) -> int:
        nonlocal n_calls, n_written
        with lock:
            n_calls += 1
            if n_calls == 2:
                raise OSError(5, "Input/output error")
        done = writev(descriptor, [buffers[0][: 1 << 20]])
        n_written += done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", failing)
        with pytest.raises(SaveError, match="Input/output error"):
            save_checkpoint(tensors, tmp_path, max_shard_size=1 << 20)
    assert n_written < 400 << 20
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert same_bytes(load_state_dict(tmp_path)["a.weight"], weights(1)["a.weight"])
