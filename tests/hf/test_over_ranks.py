"""transformers' models laid out over ranks by its own plans: fastload places each rank's parts, with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import fastload
from fastload import hf
from tests.distributed.groups import Findings, run_group
from tests.hf.over_ranks import FAMILIES, OTHERS, SAVED, SHARD_BYTES, SHARDED, STOCK, UNEVEN, write_checkpoints

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 8), reason="transformers lays models out with torch 2.8 on")

SPLIT = [*FAMILIES, *OTHERS]
SAVES = {
    **dict(zip(SPLIT, SPLIT, strict=True)),
    "whole experts": "mixtral",
    "fully sharded": "mixtral",
    SHARDED: "qwen3_moe",
}
LOADED = [*SPLIT, "converted", "whole experts", "fully sharded", "new head"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Findings]:
    """What each of two ranks found."""
    return run_group("tests.hf.over_ranks", 2, folder)


@pytest.mark.parametrize("name", [*LOADED, UNEVEN])
def test_every_part_is_the_one_that_transformers_makes(ranks: list[Findings], name: str) -> None:
    for findings in ranks:
        assert findings[name]["n_laid_out"] > 0
        assert findings[name]["differing"] == []
        assert (findings[name]["fast loads"], findings[name]["reasons"]) == (1, {})


@pytest.mark.parametrize("name", LOADED)
def test_outputs_are_those_of_transformers_load(ranks: list[Findings], name: str) -> None:
    assert all(findings[name]["equal outputs"] for findings in ranks)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen3_moe", "phi3", "whole experts", "fully sharded"])
def test_a_rank_reads_what_it_holds_and_no_more(ranks: list[Findings], name: str) -> None:
    for findings in ranks:
        found = findings[name]
        assert found["n_bytes"] == found["n_owned_bytes"] < found["n_whole_bytes"]


def test_a_state_dict_is_handed_over(ranks: list[Findings]) -> None:
    for findings in ranks:
        assert findings["given"]["reasons"] == {"a state dict for a model over a device mesh": 1}
        assert findings["given"]["differing"] == []
        assert findings["given"]["equal outputs"]


@pytest.mark.parametrize("option", ["lazy", "budget"])
def test_parts_cannot_arrive_later(ranks: list[Findings], option: str) -> None:
    for findings in ranks:
        assert findings["refusals"][option].startswith("OptionError: what is laid out over ranks cannot arrive later")


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.startswith("model")}


@pytest.mark.parametrize("label", SAVES)
def test_ranks_save_together_what_one_process_saves(
    ranks: list[Findings], folder: Path, tmp_path: Path, label: str
) -> None:
    for findings in ranks:
        assert findings["saves"][label] == {"fast saves": 1, "reasons": {}, "is told": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / SAVES[label])
    hf.save_pretrained(model, tmp_path, max_shard_size=SHARD_BYTES if label == SHARDED else "5GB")
    assert weights(folder / SAVED / label) == weights(tmp_path)
    assert (len(weights(tmp_path)) > 1) == (label == SHARDED)


@pytest.mark.parametrize("label", SAVES)
def test_ranks_save_together_what_transformers_gathers(ranks: list[Findings], folder: Path, label: str) -> None:
    mine, stock = folder / SAVED / label, folder / STOCK / label
    found, expected = fastload.load_state_dict(mine), fastload.load_state_dict(stock)
    # What is tied transformers takes for two once it is gathered.
    assert found.keys() == expected.keys() - ({"lm_head.weight"} if label == "qwen3" else set())
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert (mine / "config.json").read_bytes() == (stock / "config.json").read_bytes()


def test_what_ranks_cannot_save_together_is_handed_over(ranks: list[Findings], folder: Path) -> None:
    for findings in ranks:
        assert findings["as a .bin"] == {
            "fast saves": 0,
            "reasons": {"incremental, or a .bin, over ranks": 1},
            "is told": False,
        }
    found, expected = (fastload.load_state_dict(folder / name) for name in ("handed over", "llama"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
