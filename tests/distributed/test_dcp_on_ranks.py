"""Folders that ranks wrote through torch.distributed.checkpoint, loaded on other numbers of ranks, and written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import fastload
from fastload.cli import main
from tests.distributed.dcp_ranks import FOLDERS, Findings, Net, net
from tests.distributed.groups import run_group

# That there is no process group in this process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

N_RANKS = 4
WAYS = [(name, way) for name in FOLDERS for way in ("parallel", "sharded", "both")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks wrote and read."""
    folder = tmp_path_factory.mktemp("dcp")
    fastload.save_model(net(), folder / "ordinary")
    assert main(["convert", str(folder / "ordinary"), str(folder / "converted"), "--to", "dcp"]) == 0
    run_group("tests.distributed.dcp_ranks", N_RANKS, folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Findings]:
    return [torch.load(folder / f"findings-{rank}.pt") for rank in range(N_RANKS)]


def expected(name: str) -> dict[str, torch.Tensor]:
    dtype = torch.bfloat16 if name == "small" else torch.float32
    return net(dtype, 40 if name == "parallel" else 42).state_dict()


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(found[key].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), key


@pytest.mark.parametrize(("name", "way"), [pair for pair in WAYS if pair[1] != "parallel" or pair[0] == "parallel"])
def test_each_rank_gets_its_part_whatever_ranks_wrote_the_folder(ranks: list[Findings], name: str, way: str) -> None:
    for findings in ranks:
        assert findings[name, way]["differing"] == []
        assert findings[name, way]["differing in memory"] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_a_rank_reads_the_bytes_of_its_part_only(ranks: list[Findings], name: str) -> None:
    for findings in ranks:
        assert findings[name, "sharded"]["n_bytes"] == findings[name, "sharded"]["n_owned_bytes"]


@pytest.mark.parametrize("name", FOLDERS)
def test_one_process_gets_the_whole_as_dcp_reads_it(folder: Path, ranks: list[Findings], name: str) -> None:
    wanted = expected(name)
    assert_same(fastload.load_state_dict(folder / name), wanted)
    assert_same(dict(fastload.open_checkpoint(folder / name)), wanted)
    nested = {"both": lambda state: {"model": state}, "trained": lambda state: {"app": {"model": state}}}
    by_dcp = {key: torch.full_like(tensor, -1) for key, tensor in wanted.items()}
    dcp.load(nested.get(name, lambda state: state)(by_dcp), checkpoint_id=folder / name)
    assert_same(by_dcp, wanted)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_module_of_one_process_is_filled(folder: Path, ranks: list[Findings], name: str) -> None:
    wanted = expected(name)
    with torch.device("meta"):
        on_meta = Net(width=40 if name == "parallel" else 42)
    report = fastload.load_model(on_meta, folder / name, dtype=wanted["embed.weight"].dtype)
    assert_same(on_meta.state_dict(), wanted)
    assert report.format == "dcp"


def test_what_an_optimizer_kept_is_passed_over(folder: Path, ranks: list[Findings]) -> None:
    assert set(fastload.open_checkpoint(folder / "trained")) == set(expected("trained"))


def test_weights_are_converted_on_the_way(folder: Path, ranks: list[Findings]) -> None:
    with torch.device("meta"):
        model = Net(width=42)
    fastload.load_model(model, folder / "both", dtype=torch.bfloat16)
    assert_same(model.state_dict(), {key: tensor.bfloat16() for key, tensor in expected("both").items()})


def test_pieces_are_written_into_memory_of_another_layout(folder: Path, ranks: list[Findings]) -> None:
    model = net()
    transposed = model.head.weight.detach().t().contiguous().t()
    model.head.weight = torch.nn.Parameter(torch.zeros_like(transposed))
    assert not model.head.weight.is_contiguous()
    fastload.load_model(model, folder / "sharded")
    assert not model.head.weight.is_contiguous()
    assert_same(model.state_dict(), expected("sharded"))


def test_a_folder_of_ranks_becomes_an_ordinary_checkpoint(folder: Path, ranks: list[Findings], tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main(["convert", str(folder / "both"), str(target), "--max-shard-size", "10kB"]) == 0
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert (target / "model.safetensors.index.json").exists()
    assert_same(fastload.load_state_dict(target), expected("both"))


def test_what_was_converted_is_read_by_dcp_on_one_two_and_four_ranks(folder: Path, ranks: list[Findings]) -> None:
    assert [findings["by dcp on four"] for findings in ranks] == [[]] * 4
    assert [findings.get("by dcp on two") for findings in ranks] == [[], [], None, None]
    wanted = expected("ordinary")
    state = {key: torch.full_like(tensor, -1) for key, tensor in wanted.items()}
    dcp.load(state, checkpoint_id=folder / "converted")
    assert_same(state, wanted)
