"""A load of files that cannot be read, or that change under it, is an error that names the file, or is unharmed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastload
from fastload.checkpoint import Checkpoint, open_checkpoint
from fastload.cli.ranks import N_ASKED_OF_FOLDER, N_ASKED_OF_SHARD
from fastload.errors import ChangedFileError, FastloadError, TruncatedFileError, UnreadableFileError
from fastload.loader import load_state_dict
from fastload.plan.fusing import Fusion, Stack
from fastload.saver import save_state_dict
from fastload.storage.reading import ReadFile
from tests.conftest import same_bytes
from tests.force.programs import outcome_of

FILE = "model.safetensors"


def weights(value: float) -> dict[str, torch.Tensor]:
    return {f"{i}.weight": torch.full((64, 64), value) for i in range(4)}


def test_load_that_the_system_refuses_names_the_file_or_is_unharmed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = outcome_of("misread", tmp_path)
    for fault, result in results.items():
        assert result["problems"] == [], fault
        assert result["faults"] > 10, fault
    with capsys.disabled():
        for fault, result in results.items():
            print(f"\n{fault}: {result['told']} loads told so, {result['unharmed']} had every bit right", end="")
        print(f"\nloads with faults: {sum(result['faults'] for result in results.values())}")


def test_a_load_asks_for_each_file_of_weights_twice(tmp_path: Path) -> None:
    found = outcome_of("asked", tmp_path)
    assert found["status"] == 0
    of_shards = [calls for name, calls in found["asked"].items() if name.endswith(".safetensors")]
    assert len(of_shards) > 3
    assert {len(calls) for calls in of_shards} == {N_ASKED_OF_SHARD}
    assert sum(map(len, found["asked"].values())) - sum(map(len, of_shards)) == N_ASKED_OF_FOLDER


# Between open and read.


def mapped(checkpoint: Checkpoint) -> object:
    return checkpoint["0.weight"]


def read(checkpoint: Checkpoint) -> object:
    (path,) = checkpoint.files
    return ReadFile(path, checkpoint.n_file_bytes(path), checkpoint.modified_ns(path))


WAYS = pytest.mark.parametrize("use", [mapped, read])


def rewrite(path: Path, content: bytes) -> None:
    """In place, a second later."""
    modified_ns = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(modified_ns, modified_ns + 10**9))


@pytest.mark.parametrize("becomes", ["another file", "nothing"])
def test_a_checkpoint_that_is_open_stays_what_it_was(tmp_path: Path, becomes: str) -> None:
    save_state_dict(weights(1), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    if becomes == "nothing":
        (tmp_path / FILE).unlink()
    else:
        save_state_dict(weights(2), tmp_path)
    assert all(same_bytes(checkpoint[key], tensor) for key, tensor in weights(1).items())


def test_file_replaced_between_open_and_read_is_told(tmp_path: Path) -> None:
    save_state_dict(weights(1), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    save_state_dict(weights(2), tmp_path)
    os.utime(tmp_path / FILE, ns=(0, 10**9))  # clocks of file systems may tick slowly
    with pytest.raises(ChangedFileError, match="replaced or rewritten") as caught:
        read(checkpoint)
    assert caught.value.file == str(tmp_path / FILE)
    assert caught.value.fix


@WAYS
def test_file_rewritten_between_open_and_read_is_told(tmp_path: Path, use: Callable[[Checkpoint], object]) -> None:
    save_state_dict(weights(1), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    rewrite(tmp_path / FILE, (tmp_path / FILE).read_bytes())
    with pytest.raises(ChangedFileError):
        use(checkpoint)


@WAYS
def test_file_cut_between_open_and_read_is_told(tmp_path: Path, use: Callable[[Checkpoint], object]) -> None:
    save_state_dict(weights(1), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / FILE, 5000)
    with pytest.raises(TruncatedFileError) as caught:
        use(checkpoint)
    assert caught.value.file == str(tmp_path / FILE)


def test_file_removed_between_open_and_read_is_told(tmp_path: Path) -> None:
    save_state_dict(weights(1), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(UnreadableFileError) as caught:
        read(checkpoint)
    assert caught.value.file == str(tmp_path / FILE)


def test_file_replaced_before_its_pages_are_laid_side_by_side_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastload.placement import cpu

    save_state_dict(weights(1), tmp_path)
    module = torch.nn.Module()
    module.register_parameter("all", torch.nn.Parameter(torch.empty(4, 64, 64, device="meta")))
    place = cpu.place

    def rewriting(*args: object, **kwargs: object) -> object:
        rewrite(tmp_path / FILE, (tmp_path / FILE).read_bytes())
        return place(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("fastload.placement.placing.place", rewriting)
    with pytest.raises(ChangedFileError):
        fastload.load_model(module, tmp_path, fusions=[Fusion(("*.weight",), "all", (Stack(0),))])


# While a model stands on it.


def test_file_replaced_while_mapped_leaves_the_tensors_as_they_are(tmp_path: Path) -> None:
    save_state_dict(weights(1), tmp_path)
    tensors = load_state_dict(tmp_path)
    save_state_dict(weights(2), tmp_path)
    shutil.rmtree(tmp_path)
    assert all(same_bytes(tensors[key], tensor) for key, tensor in weights(1).items())


@pytest.mark.parametrize("way", ["detached=True", "detach"])
def test_model_of_its_own_memory_is_unharmed_by_what_becomes_of_the_file(tmp_path: Path, way: str) -> None:
    save_state_dict({"weight": torch.ones(512, 512)}, tmp_path)
    module = torch.nn.Linear(512, 512, bias=False, device="meta")
    fastload.load_model(module, tmp_path, detached=way == "detached=True")
    if way == "detach":
        assert fastload.detach(module) == 512 * 512 * 4
    os.truncate(tmp_path / FILE, 0)
    assert same_bytes(module.weight, torch.ones(512, 512))


def test_file_cut_while_mapped_ends_the_process_as_documented(tmp_path: Path) -> None:
    save_state_dict({"weight": torch.ones(512, 512)}, tmp_path)
    program = (
        "import os, sys, fastload\n"
        "tensor = fastload.load_state_dict(sys.argv[1])['weight']\n"
        "os.truncate(sys.argv[1] + '/model.safetensors', 0)\n"
        "tensor.sum()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGBUS


@pytest.mark.parametrize("n_bytes", range(0, 17_000, 1_000))
def test_file_cut_anywhere_before_it_is_opened_is_told(tmp_path: Path, n_bytes: int) -> None:
    save_state_dict({"weight": torch.ones(64, 64)}, tmp_path)
    os.truncate(tmp_path / FILE, n_bytes)
    with pytest.raises(FastloadError) as caught:
        load_state_dict(tmp_path)
    assert caught.value.file == str(tmp_path / FILE)
