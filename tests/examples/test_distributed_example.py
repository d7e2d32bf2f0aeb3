"""The example of models that are split over ranks, under torchrun and without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastload

TIMEOUT_S = 180
EXAMPLE = "fastload.examples.distributed"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def shares(output: str) -> list[tuple[str, str]]:
    """What each rank read, and of how much."""
    return re.findall(r"rank \d: read (.*?) of (.*?) in \d+ ms", output)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = fastload.Qwen3Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    fastload.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_two_ranks_read_half_each_compute_the_same_and_save_what_loads_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", EXAMPLE, str(model), "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert "split over 2 ranks by gloo" in done.stdout
    assert len(shares(done.stdout)) == 2
    assert "loaded again, every byte the same: yes" in done.stdout
    before, after = fastload.open_checkpoint(model), fastload.open_checkpoint(out)
    assert set(before) == set(after)
    assert all(bool((before[key] == after[key]).all()) for key in before)


def test_without_torchrun_one_rank_makes_a_model_and_has_all_of_it() -> None:
    done = run(EXAMPLE)
    assert done.returncode == 0, done.stderr
    ((read, whole),) = shares(done.stdout)
    assert read == whole
    assert "at most 0 from one process's logits" in done.stdout


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = run(EXAMPLE, str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert str(tmp_path / "nothing") in done.stderr
    assert "Traceback" not in done.stderr
