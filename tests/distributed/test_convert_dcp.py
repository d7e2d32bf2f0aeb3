"""fastload convert to and from folders of torch.distributed.checkpoint, and what other commands make of them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp

import fastload
from fastload.cli import main
from fastload.storage.memory import private_bytes

# That there is no process group in this process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class Outcome(NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a BERT of two layers and random weights, in one safetensors file."""
    config = fastload.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    fastload.BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for key, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[key].dtype, b[key].shape), key
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), b[key].reshape(-1).view(torch.uint8)), key


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def by_dcp(folder: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {key: torch.zeros_like(tensor) for key, tensor in like.items()}
    dcp.load(state, checkpoint_id=folder)
    return state


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_there_and_back_every_byte_is_the_same(
    command: Callable[..., Outcome], bert: Path, tmp_path: Path, form: str
) -> None:
    weights = fastload.load_state_dict(bert)
    assert command("convert", bert, tmp_path / "first", "--to", form, "--max-shard-size", "10kB").status == 0
    done = command("convert", tmp_path / "first", tmp_path / "dcp", "--to", "dcp")
    assert done.status == 0
    assert "wrote     .metadata" in done.out
    assert names(tmp_path / "dcp") == [".metadata", "__0_0.distcp", "config.json"]
    assert_same(by_dcp(tmp_path / "dcp", weights), weights)
    assert command("convert", tmp_path / "dcp", tmp_path / "back").status == 0
    assert names(tmp_path / "back") == ["config.json", "model.safetensors"]
    assert_same(fastload.load_state_dict(tmp_path / "back"), weights)


def test_a_cast_is_done_in_both_directions(command: Callable[..., Outcome], bert: Path, tmp_path: Path) -> None:
    half = {key: tensor.bfloat16() for key, tensor in fastload.load_state_dict(bert).items()}
    assert command("convert", bert, tmp_path / "dcp", "--to", "dcp", "--dtype", "bf16").status == 0
    assert_same(by_dcp(tmp_path / "dcp", half), half)
    assert command("convert", tmp_path / "dcp", tmp_path / "back", "--dtype", "float32").status == 0
    assert_same(fastload.load_state_dict(tmp_path / "back"), {key: tensor.float() for key, tensor in half.items()})


def test_tied_tensors_are_both_in_a_folder_for_ranks(command: Callable[..., Outcome], tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    fastload.save_model(torch.nn.ModuleDict({"a": Holder(weight), "b": Holder(weight)}), tmp_path / "tied")
    assert command("convert", tmp_path / "tied", tmp_path / "dcp", "--to", "dcp").status == 0
    assert_same(fastload.load_state_dict(tmp_path / "dcp"), {"a.weight": weight, "b.weight": weight})


class Holder(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight) if not isinstance(weight, torch.nn.Parameter) else weight


def test_a_folder_with_something_in_it_is_not_written_to(command: Callable[..., Outcome], bert: Path) -> None:
    before = {path.name: path.read_bytes() for path in bert.iterdir()}
    done = command("convert", bert, bert, "--to", "dcp")
    assert done.status == 2
    assert "must be new" in done.err
    assert {path.name: path.read_bytes() for path in bert.iterdir()} == before


def test_a_target_below_a_file_is_refused(command: Callable[..., Outcome], bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = command("convert", bert, tmp_path / "file" / "dcp", "--to", "dcp")
    assert done.status == 1
    assert "could not be written" in done.err


def test_a_write_that_fails_leaves_no_checkpoint(bert: Path, tmp_path: Path) -> None:
    # No file of this process may grow beyond 20 kB: what a full disk does.
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "fastload", "convert", str(bert), str(tmp_path / "dcp"), "--to", "dcp"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "could not be written: File too large" in done.stderr
    assert names(tmp_path / "dcp") == ["config.json"]


def test_converting_takes_little_memory(command: Callable[..., Outcome], tmp_path: Path) -> None:
    if private_bytes() is None:
        pytest.skip("this system does not say how much memory a process has")
    weights = {f"layer.{n}.weight": torch.full((1000, 1000), 1.5) for n in range(40)}
    fastload.save_state_dict(weights, tmp_path / "source")
    weights.clear()
    command("convert", tmp_path / "source", tmp_path / "warm", "--to", "dcp")
    peaks = [0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            peaks.append(private_bytes() or 0)

    watcher = threading.Thread(target=watch)
    before = private_bytes() or 0
    watcher.start()
    there = command("convert", tmp_path / "source", tmp_path / "dcp", "--to", "dcp").status
    back = command("convert", tmp_path / "dcp", tmp_path / "back", "--max-shard-size", "20MB").status
    stop.set()
    watcher.join()
    assert (there, back) == (0, 0)
    # 160 MB are read and written, twice.
    assert max(peaks) - before < 24e6


def test_a_folder_of_ranks_is_inspected_and_compared(
    command: Callable[..., Outcome], bert: Path, tmp_path: Path
) -> None:
    assert command("convert", bert, tmp_path / "dcp", "--to", "dcp").status == 0
    found = json.loads(command("inspect", tmp_path / "dcp", "--json").out)
    assert found["format"] == "dcp"
    assert found["n_tensors"] == len(fastload.open_checkpoint(bert))
    assert {tensor["n_chunks"] for tensor in found["tensors"]} == {1}
    assert command("diff", bert, tmp_path / "dcp").status == 0


@pytest.mark.parametrize("name", ["plan", "verify"])
def test_commands_that_do_not_read_it_say_what_to_do(
    command: Callable[..., Outcome], bert: Path, tmp_path: Path, name: str
) -> None:
    assert command("convert", bert, tmp_path / "dcp", "--to", "dcp").status == 0
    done = command(name, tmp_path / "dcp", "--json")
    assert done.status == 2
    assert "fastload convert DIR OUT" in done.err
