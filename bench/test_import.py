"""A process that imports the library, against one that does nothing."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from suite.fresh import seconds_of_process
from workloads.imports import IMPORT_SCRIPTS


@pytest.mark.parametrize("what", ["fastload", "bare python"])
def test_import(benchmark: BenchmarkFixture, what: str) -> None:
    benchmark.group = "import in a fresh process"
    # The script itself fails if torch was imported.
    benchmark.pedantic(seconds_of_process, args=("-c", IMPORT_SCRIPTS[what]), rounds=20, warmup_rounds=1)
