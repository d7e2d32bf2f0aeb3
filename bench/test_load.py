"""Second loads of BERT-base in one process, a table for each file format. Results are hashed after the clock stopped.

pytest-benchmark finishes one loader before it begins the next, so a busy moment of the machine can hit one of them;
``compare.py load-bert`` lets them take turns.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from suite.fingerprint import fingerprint
from suite.loaders import BERT_LOADERS

# Other libraries may warn on their import; that is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")

ROUNDS = 15


@pytest.mark.parametrize("loader", BERT_LOADERS)
def test_load_bert(benchmark: BenchmarkFixture, loader: str, bert_folders: dict[str, Path], bert_digest: str) -> None:
    how = BERT_LOADERS[loader]
    benchmark.group = f"load BERT-base fp32, {how.file_format}"
    model: Any = benchmark.pedantic(
        how.load, args=(bert_folders[how.file_format],), setup=_collect_garbage, rounds=ROUNDS, warmup_rounds=1
    )
    assert not model.training
    assert fingerprint(model.state_dict()) == bert_digest


def _collect_garbage() -> None:
    """Models hold cycles: free the last one outside the clock."""
    gc.collect()
