"""Comparing two runs of a suite by their junit files, which real pytest runs write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.upstream.outcomes import Difference, Outcome, Test, compare, read_outcomes, table

STOCK = """
import unittest
import pytest

def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="no device")
def test_elsewhere(): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert False
@pytest.fixture
def broken(): raise OSError("no disk")
def test_unprepared(broken): pass
def test_only_here(): pass

class Test_bert(unittest.TestCase):
    def test_parts(self):
        for part in range(3):
            with self.subTest(part=part):
                self.assertLess(part, PARTS)
    def test_whole(self): pass
"""


def outcomes(folder: Path, source: str) -> dict[Test, Outcome]:
    """What pytest writes of a file of tests."""
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    (folder / "test_models.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "--junitxml=junit.xml"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=100)
    assert done.returncode in (0, 1)
    return read_outcomes(folder / "junit.xml")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[Test, Outcome]:
    return outcomes(tmp_path_factory.mktemp("runs") / "stock", STOCK.replace("PARTS", "3"))


def test_every_kind_of_outcome_is_read_with_what_the_test_said(stock: dict[Test, Outcome]) -> None:
    kinds = {name: outcome.kind for (_, name), outcome in stock.items()}
    assert kinds == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_elsewhere": "skipped",
        "test_known": "xfailed",
        "test_unprepared": "error",
        "test_only_here": "passed",
        "test_parts": "passed",
        "test_whole": "passed",
    }
    said = {name: outcome.said for (_, name), outcome in stock.items()}
    assert "one is not two" in said["test_wrong"]
    assert "no disk" in said["test_unprepared"]
    assert said["test_elsewhere"] == "no device"


def test_the_same_outcomes_do_not_differ(stock: dict[Test, Outcome], tmp_path: Path) -> None:
    again = outcomes(tmp_path / "again", STOCK.replace("PARTS", "3"))
    assert compare(stock, again) == []


def test_a_failing_subtest_fails_its_test(stock: dict[Test, Outcome], tmp_path: Path) -> None:
    second = outcomes(tmp_path / "second", STOCK.replace("PARTS", "2"))
    (difference,) = compare(stock, second)
    assert difference.worse
    assert str(difference).startswith("Test_bert::test_parts: passed -> failed")


def test_worse_and_better_outcomes_are_told_apart_and_the_worse_come_first(
    stock: dict[Test, Outcome], tmp_path: Path
) -> None:
    other = STOCK.replace("PARTS", "3").replace("1 == 2", "1 == 1").replace("test_right(): pass", "test_right(): 1 / 0")
    differences = compare(stock, outcomes(tmp_path / "second", other))
    assert [(d.test[1], d.first.kind, d.second.kind, d.worse) for d in differences] == [
        ("test_right", "passed", "failed", True),
        ("test_wrong", "failed", "passed", False),
    ]
    assert "division by zero" in str(differences[0])
    assert "one is not two" in str(differences[1])


def test_a_test_that_does_not_run_any_more_is_worse_even_if_it_failed(
    stock: dict[Test, Outcome], tmp_path: Path
) -> None:
    other = (
        STOCK.replace("PARTS", "3")
        .replace("def test_only_here", "def only_here")
        .replace("def test_wrong", "def wrong")
    )
    differences = compare(stock, outcomes(tmp_path / "second", other))
    assert {(d.test[1], d.second.kind, d.worse) for d in differences} == {
        ("test_only_here", "absent", True),
        ("test_wrong", "absent", True),
    }


def test_a_skipped_test_that_ran_before_is_worse() -> None:
    test = ("checks.Test_bert", "test_save_load")
    (difference,) = compare({test: Outcome("passed")}, {test: Outcome("skipped", "no device")})
    assert difference.worse
    assert str(difference) == "Test_bert::test_save_load: passed -> skipped  (no device)"


def test_the_table_counts_by_class_and_in_all() -> None:
    first = {
        ("checks.Test_bert", "test_a"): Outcome("passed"),
        ("checks.Test_bert", "test_b"): Outcome("skipped"),
        ("checks.Test_t5", "test_a"): Outcome("passed"),
    }
    differing = [
        Difference(("checks.Test_bert", "test_a"), Outcome("passed"), Outcome("failed")),
        Difference(("checks.Test_t5", "test_new"), Outcome("absent"), Outcome("passed")),
    ]
    assert [line.split() for line in table(first, differing).splitlines()] == [
        ["model", "tests", "skipped", "same", "differ"],
        ["bert", "2", "1", "1", "1"],
        ["t5", "1", "0", "1", "1"],
        ["all", "3", "1", "2", "2"],
    ]
