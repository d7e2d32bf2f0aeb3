"""Ranks that fail or are killed while all save, or while they load: the others hear of it, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastload
from tests.distributed import failing_load
from tests.distributed.layouts import Net
from tests.force.programs import outcome_of

OLD = [*(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)), "model.safetensors.index.json"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """How saves ended of which some rank could not do its part."""
    return outcome_of("refused_saves", tmp_path_factory.mktemp("refused"), traces=False, room="distributed")


# What each of three ranks says at the end; "rank R" of a SaveError is the one that failed.
REFUSALS = {
    "disk full": (2, "model.safetensors could not be written: File too large"),
    "on meta": (1, "1 tensors are on the meta device and have no values to save: layer.0.weight"),
    "other folder": (1, "this rank does not see the file that rank 0 made for all ranks to write"),
    "a file": (0, "a checkpoint is saved to a folder, and this is a file"),
    "broken": (2, "RuntimeError: the bar is broken"),
    "broken, first": (0, "RuntimeError: the bar is broken"),
    "two of them": (2, "1 tensors are on the meta device"),
}
OPTIONS = {
    "no tensor": (2, "the state dict holds what a checkpoint cannot"),
    "other type": (0, "the ranks have different tensors under one name"),
    "part missing": (0, "the ranks do not have all of a tensor between them"),
    "bad metadata": (0, "a key or a metadata text is not Unicode"),
}
OPTIONS_OF_ALL = {
    "sum": "a parameter is laid out over ranks in a way that fastload does not know",
    "bin": "ranks that save together write all of a checkpoint, as safetensors",
    "incremental": "ranks that save together write all of a checkpoint, as safetensors",
}


@pytest.mark.parametrize("name", [*REFUSALS, *OPTIONS, *OPTIONS_OF_ALL, "interrupted", "absent"])
def test_the_old_checkpoint_is_all_there_is_after_a_save_that_failed(refused: Any, name: str) -> None:
    assert refused[name]["generation"] == 1
    assert refused[name]["names"] == ["config.json", *OLD]


@pytest.mark.parametrize("name", REFUSALS)
def test_all_ranks_name_the_one_that_failed_and_the_cause(refused: Any, name: str) -> None:
    rank, cause = REFUSALS[name]
    for ending in refused[name]["endings"]:
        assert ending.startswith(f"SaveError: the save was given up, because rank {rank} failed")
        assert f"rank {rank}: {cause}" in ending


@pytest.mark.parametrize("name", OPTIONS)
def test_what_cannot_be_meant_is_an_option_error_on_the_rank_that_found_it(refused: Any, name: str) -> None:
    rank, problem = OPTIONS[name]
    for number, ending in enumerate(refused[name]["endings"]):
        if number == rank:
            assert ending.startswith(f"OptionError: {problem}")
        else:
            assert f"rank {rank}: {problem}" in ending


@pytest.mark.parametrize("name", OPTIONS_OF_ALL)
def test_options_that_ranks_do_not_have_together_are_refused_by_all(refused: Any, name: str) -> None:
    assert all(ending.startswith(f"OptionError: {OPTIONS_OF_ALL[name]}") for ending in refused[name]["endings"])


def test_an_interrupted_rank_ends_as_it_was_told_and_the_others_hear_of_it(refused: Any) -> None:
    endings = refused["interrupted"]["endings"]
    assert endings[1].startswith("KeyboardInterrupt")
    assert all("rank 1: KeyboardInterrupt" in endings[rank] for rank in (0, 2))


def test_a_rank_that_does_not_take_part_is_named_when_the_timeout_of_the_group_is_over(refused: Any) -> None:
    first, _, third = refused["absent"]["endings"]
    assert "rank 1: it did not answer (Timed out waiting" in first
    assert third.startswith("SaveError: the save was given up")


@pytest.mark.parametrize("name", ["fine", "no group of the processor"])
def test_saves_that_succeed_leave_the_new_checkpoint_only(refused: Any, name: str) -> None:
    assert refused[name]["endings"] == ["done"] * 3
    assert refused[name]["generation"] == 2
    assert refused[name]["names"] == ["config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What was found after a rank was killed at each of its system calls that concern the folder."""
    return outcome_of("killed_ranks", tmp_path_factory.mktemp("killed"), room="distributed")


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_rank_may_be_killed_at_any_moment_of_a_save(
    killed: Any, victim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert killed[victim]["problems"] == []
    assert killed[victim]["n_kills"] >= (30 if victim == "0" else 8)
    assert killed[victim]["found"] == ["1", "2"]
    assert f"rank {victim}: it did not answer" in killed[victim]["error"]
    with capsys.disabled():
        print(f"\nkill -9 of rank {victim} while all save: {killed[victim]['n_kills']} fault points: none lost")


def torchrun(folder: Path, way: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of a real torchrun, one of which fails; it looks at them every five seconds only."""
    fastload.save_model(Net(), folder / "checkpoint")
    fastload.save_model(Net(), folder / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["--monitor-interval", "5", "-m", "tests.distributed.failing_load", str(folder), way]
    return subprocess.run(
        [*command, *program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * failing_load.TIMEOUT_S,
    )


@pytest.mark.parametrize(("way", "cause"), [("missing", "CheckpointNotFoundError"), ("killed", "Signal 9")])
def test_a_rank_that_fails_in_a_load_ends_the_others(tmp_path: Path, way: str, cause: str) -> None:
    done = torchrun(tmp_path, way)
    assert done.returncode != 0
    assert cause in done.stderr
    assert (tmp_path / "loaded-0").exists()
    assert "SaveError: the save was given up, because rank 1 failed" in done.stderr
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    fastload.load_model(Net(), tmp_path / "out", verify=True)
