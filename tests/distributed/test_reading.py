"""Ranks of a real process group: what each of them asks of the files, alone and for each other, and takes of memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastload
from tests.distributed.groups import Findings
from tests.distributed.layouts import Net
from tests.distributed.reading import MB, N_RANKS, Wide
from tests.distributed.test_ranks import write_checkpoints

TIMEOUT_S = 200
SHARED = ["tensor parallel", "converted", "both", "copies"]
COLD = ["cold tensor parallel", "cold fully sharded"]
COLD_SHARED = ["cold tensor parallel, shared", "cold fully sharded, shared", "cold, two machines"]

on_each_machine = pytest.mark.parametrize("n_local", [2, 4])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Findings]:
    """What each of four ranks found; they run once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    write_checkpoints(folder)
    shutil.copytree(folder / "checkpoint", folder / "cut")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 66}
    config = fastload.LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **sizes)
    fastload.LlamaForCausalLM(config).save_pretrained(folder / "native")
    fastload.save_model(Net(), folder / "shards", max_shard_size="10KB")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Wide().named_parameters()}
    bits = torch.arange(8192 * 2048, dtype=torch.int32).view(torch.float32)
    wide = {name: bits[: shape.numel()].view(shape) for name, shape in shapes.items()}
    fastload.save_state_dict({name: tensor.clone() for name, tensor in wide.items()}, folder / "wide")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCAL_")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.reading", str(rank), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(N_RANKS)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder / "wide")
    return [torch.load(folder / f"findings-{rank}.pt") for rank in range(N_RANKS)]


def of(ranks: list[Findings], name: str) -> list[Findings]:
    return [findings[name] for findings in ranks]


@on_each_machine
@pytest.mark.parametrize("name", SHARED)
def test_what_ranks_read_for_each_other_is_what_each_reads_alone(
    ranks: list[Findings], name: str, n_local: int
) -> None:
    for found in of(ranks, f"{name} on {n_local}"):
        assert found["differing"] == []
        assert found["kinds"] == {True}
        assert found["actions"]["exchange"] > 0


@pytest.mark.parametrize("name", ["shards", "shards of experts"])
def test_shards_of_any_dimension_are_the_same(ranks: list[Findings], name: str) -> None:
    assert of(ranks, name) == [[]] * N_RANKS


@on_each_machine
def test_copies_are_read_once_a_machine(ranks: list[Findings], n_local: int) -> None:
    found = of(ranks, f"copies on {n_local}")
    for first in range(0, N_RANKS, n_local):
        read = [one["n_read_bytes"] for one in found[first : first + n_local]]
        assert sum(read) == found[0]["n_bytes"]
        assert f"read for {n_local} ranks of this machine" in found[first]["note"]


def test_without_torchrun_a_machine_is_known_by_its_name(ranks: list[Findings]) -> None:
    for found in of(ranks, "by host name"):
        assert found["differing"] == []
        assert "ranks of this machine" in found["note"]


def test_native_models_are_read_together_too(ranks: list[Findings]) -> None:
    found = of(ranks, "native")
    for one in found:
        assert one["differing"] == []
        assert one["actions"]["exchange"] > 0
    read = sum(one["n_read_bytes"] for one in found)
    assert read == found[0]["n_whole_bytes"]


@pytest.mark.parametrize("name", COLD)
def test_a_rank_asks_for_its_share_of_the_weights_and_no_more(ranks: list[Findings], name: str) -> None:
    for found in of(ranks, name):
        assert found["wrong"] == []
        assert found["n_owned_bytes"] <= found["n_read_bytes"] <= 1.05 * found["n_owned_bytes"]
        assert found["n_read_bytes"] < 0.35 * found["n_whole_bytes"]


@pytest.mark.parametrize("name", COLD + COLD_SHARED)
def test_storage_is_read_once_by_ranks_with_one_page_cache(ranks: list[Findings], name: str) -> None:
    found = of(ranks, name)
    assert 0.9 <= sum(one["fetched_bytes"] for one in found) / found[0]["n_whole_bytes"] <= 1.05


def test_a_rank_on_its_own_has_no_more_fetched_than_it_asks_for(ranks: list[Findings]) -> None:
    found = ranks[0]["cold, alone"]
    assert found["wrong"] == []
    assert 0.9 <= found["fetched_bytes"] / found["n_owned_bytes"] <= 1.05


def test_rows_that_lie_apart_are_asked_for_alone(ranks: list[Findings]) -> None:
    notes = [note for found in of(ranks, "cold tensor parallel") for note in found["notes"]]
    assert "cold: 50.3 MB in 6144 runs of rows, asked for without what lies between them" in notes


def test_ranks_of_a_machine_together_ask_for_every_byte_once(ranks: list[Findings]) -> None:
    for name in COLD_SHARED[:2]:
        found = of(ranks, name)
        assert sum(one["n_read_bytes"] for one in found) == found[0]["n_whole_bytes"]
        assert all(one["wrong"] == [] for one in found)


def test_each_of_two_machines_asks_for_what_its_ranks_need(ranks: list[Findings]) -> None:
    found = of(ranks, "cold, two machines")
    # Both need what is not cut, and each has half of the rest.
    n_cut_bytes = 3 * 2 * 8192 * 2048 * 4
    expected = found[0]["n_whole_bytes"] - n_cut_bytes // 2
    assert [sum(one["n_read_bytes"] for one in found[first : first + 2]) for first in (0, 2)] == [expected] * 2
    assert all(one["wrong"] == [] for one in found)


@pytest.mark.parametrize("name", COLD + COLD_SHARED)
def test_private_memory_is_the_share_and_little_more(ranks: list[Findings], name: str) -> None:
    for found in of(ranks, name):
        assert found["peak_bytes"] <= found["n_owned_bytes"] + 64 * MB


def test_what_was_read_is_in_the_report(ranks: list[Findings]) -> None:
    assert any("asked of the files" in found["report"] for found in of(ranks, "cold tensor parallel, shared"))


def test_a_rank_without_its_file_ends_the_others(ranks: list[Findings]) -> None:
    *others, failed = (found["missing"] for found in of(ranks, "failing"))
    assert failed.startswith("CheckpointNotFoundError")
    assert all(said.startswith("RankError: another rank of this machine failed to load") for said in others)
    assert all("rank 3: there is no such file or folder" in said for said in others)


def test_ranks_with_different_checkpoints_are_refused(ranks: list[Findings]) -> None:
    for found in of(ranks, "failing"):
        assert found["other"].startswith("OptionError: the ranks of a machine cannot share what they read of different")
        assert "model-00001-of-0000" in found["other"]


def test_a_rank_that_fails_to_read_ends_the_others(ranks: list[Findings]) -> None:
    failed, *others = (found["cut"] for found in of(ranks, "failing"))
    assert failed.startswith("TruncatedFileError")
    assert all("rank 0: a weight file was cut after its header was read" in said for said in others)


def test_the_group_works_after_failures(ranks: list[Findings]) -> None:
    assert [found["after"] for found in of(ranks, "failing")] == [["map", "exchange"]] * N_RANKS


def test_a_rank_that_is_killed_ends_the_others(ranks: list[Findings]) -> None:
    assert "killed" not in ranks[3]
    for findings in ranks[:3]:
        assert findings["killed"].startswith("RankError: a rank of this machine is gone")


def test_ranks_cannot_share_without_a_group(tmp_path: Path) -> None:
    with pytest.raises(fastload.errors.OptionError, match="only in a process group"):
        fastload.load_model(Net(), tmp_path, dedup="node")


def test_another_way_to_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fastload.errors.OptionError, match="not a way to share reading"):
        fastload.load_model(Net(), tmp_path, dedup="world")


@pytest.mark.parametrize("later", [{"lazy": True}, {"stream": True}, {"memory_budget": "1GB"}])
def test_what_is_shared_cannot_arrive_later(tmp_path: Path, later: dict[str, object]) -> None:
    with pytest.raises(fastload.errors.OptionError, match="cannot arrive later"):
        fastload.load_model(Net(), tmp_path, dedup="node", **later)
