"""``bench/gpu.py`` from its arguments to its last line, on the CPU with tiny checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LOADERS = ("fastload", "transformers", "safetensors")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    folder = str(tmp_path_factory.mktemp("bench"))
    done = _run("--device", "cpu", "--small", "--folder", folder, "--repeat", "7", "--loaders", *LOADERS)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def document(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ran.stdout[ran.stdout.index("\n{\n") :])
    return found


def _steps(document: dict[str, Any], status: str = "done") -> dict[tuple[str, str], dict[str, Any]]:
    return {(step["group"], step["row"]): step for step in document["steps"] if step["status"] == status}


def test_no_step_fails_and_those_that_are_skipped_say_why(document: dict[str, Any]) -> None:
    assert document["is_whole"]
    assert _steps(document, "failed") == {}
    assert all(step["words"] for step in _steps(document, "skipped").values())
    done = _steps(document)
    for group in ("dense warm", "moe warm", "fp32 to bf16"):
        assert {row for of, row in done if of == group} == set(LOADERS)
    assert {row for of, row in done if of == "first forward warm"} == {"fastload", "transformers"}


def test_all_loaders_brought_the_same_bytes(document: dict[str, Any]) -> None:
    assert document["differences"] == []
    assert {content: n for content, n in document["compared"].items() if n > 1}.keys() >= {"dense", "moe"}
    digests = {step["digest"] for step in _steps(document).values() if step.get("content") == "moe"}
    assert len(digests) == 1


def test_every_promise_has_its_figure_or_the_reason_why_not(document: dict[str, Any]) -> None:
    named = {target["what"] for target in document["targets"]} | document["not_measured"].keys()
    assert len(named) == 10
    assert {"dense warm: transformers / fastload", "repeated loads: growth of host memory"} <= named


def test_repeated_loads_and_rates_are_in_the_document(document: dict[str, Any]) -> None:
    done = _steps(document)
    assert len(done["repeated loads", "fastload"]["seconds"]) == 7
    assert done["hardware", "link"]["is_host_copy"]
    assert done["hardware", "page cache"]["best_gb_per_s"] > 0


def test_the_table_says_what_was_measured_and_that_it_is_no_speed(ran: subprocess.CompletedProcess[str]) -> None:
    table = ran.stdout[: ran.stdout.index("\n{\n")]
    assert "--small: these figures say nothing about speed" in table
    assert "memory to memory (no device here)" in table
    assert "dense warm (dense, 0.00 GB)" in table
    assert "skipped: pytest -m gpu: they need a CUDA device (tests)" in table


def test_a_budget_that_is_spent_leaves_every_step_out_by_name(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    arguments = ("--device", "cpu", "--small", "--folder", str(tmp_path), "--loaders", "safetensors")
    done = _run(*arguments, "--budget", "0", "--output", str(output))
    assert done.returncode == 0, done.stderr
    steps = json.loads(output.read_text())["steps"]
    assert all(step["status"] == "skipped" and step["words"].startswith("no time") for step in steps)
    assert "not measured: dense warm: transformers / fastload" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_the_device_is_told(tmp_path: Path) -> None:
    done = _run("--small", "--folder", str(tmp_path), "--loaders", "safetensors")
    assert done.returncode == 2
    assert "torch finds no CUDA device" in done.stderr
