"""Loads on many threads at once, which transformers alone gets wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastload import hf
from tests.hf.many_threads import DTYPES, N_LOADS, N_THREADS, load_by_transformers, outcomes, state_of

Written = Callable[..., Path]
ROOT = Path(__file__).parent.parent.parent
ALL_RIGHT = Counter(right=N_THREADS * N_LOADS)
AUTO_OF = {
    "bert": "AutoModelForMaskedLM",
    "llama": "AutoModelForCausalLM",
    "qwen3_moe": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
}


@pytest.fixture(scope="module")
def folders(written: Written) -> dict[Path, str]:
    """Checkpoints of several families, and the Auto class of each."""
    return {written(family): name for family, name in AUTO_OF.items()}


@pytest.fixture(scope="module")
def expected(folders: dict[Path, str]) -> dict[tuple[Path, str], Any]:
    return {(folder, dtype): state_of(load_by_transformers(folder, dtype)) for folder in folders for dtype in DTYPES}


def test_transformers_alone_gives_models_that_are_not_whole(folders: dict[Path, str]) -> None:
    command = [sys.executable, "-m", "tests.hf.many_threads", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts.get("right", 0) < sum(counts.values())
    assert counts.get("on meta", 0) + counts.get("other values", 0) > 0


# That nothing global is changed is seen by the guard around every test.
def test_every_model_is_right_through_the_auto_classes(
    folders: dict[Path, str], expected: dict[tuple[Path, str], Any]
) -> None:
    hf.reset_stats()
    autos = {folder: getattr(hf, name) for folder, name in folders.items()}
    counts = outcomes(lambda folder, dtype: autos[folder].from_pretrained(folder, dtype=dtype), expected)
    assert counts == ALL_RIGHT
    assert hf.stats() == hf.Stats(fast_loads=N_THREADS * N_LOADS)


def test_every_model_is_right_where_each_thread_switches_it_on(expected: dict[tuple[Path, str], Any]) -> None:
    def load(folder: Path, dtype: str) -> Any:
        with hf.enabled():
            return load_by_transformers(folder, dtype)

    assert outcomes(load, expected) == ALL_RIGHT
