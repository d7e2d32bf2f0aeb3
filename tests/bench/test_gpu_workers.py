"""Processes that answer requests: what they cannot do, and what becomes of those that fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_suite.marked_tests import MarkedTestsFailedError, run_marked_tests
from gpu_suite.schedule import NotHereError
from gpu_suite.workers import PROBE, RequestFailedError, Workers


@pytest.fixture
def workers() -> Iterator[Workers]:
    started = Workers("cpu")
    yield started
    started.close()


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_loader_that_cannot_load_to_the_device_is_not_here(workers: Workers) -> None:
    for _ in range(2):  # asked again, it is not started again
        with pytest.raises(NotHereError, match="prefetch"):
            workers.ask("safetensors prefetch", {"do": "load"}, 60)


def test_a_request_that_fails_is_an_error_and_the_next_has_a_fresh_process(workers: Workers, tmp_path: Path) -> None:
    first = workers.start(PROBE).pid
    with pytest.raises(RequestFailedError, match="KeyError: 'no such shape'"):
        workers.ask(PROBE, {"do": "make", "folder": str(tmp_path), "shape": "no such shape", "small": True}, 60)
    assert _ended(first)
    made = workers.ask(PROBE, {"do": "make", "folder": str(tmp_path / "a"), "shape": "dense", "small": True}, 60)
    assert made["n_tensors"] == 30


def test_a_process_that_dies_is_an_error(workers: Workers) -> None:
    workers.about(PROBE, 60)
    os.kill(workers.start(PROBE).pid, signal.SIGKILL)
    with pytest.raises(RequestFailedError, match="the process of probe ended"):
        workers.ask(PROBE, {"do": "flush", "timeout_s": 1}, 60)


def test_a_process_that_does_not_answer_in_time_is_ended(workers: Workers) -> None:
    pid = workers.start(PROBE).pid
    with pytest.raises(RequestFailedError, match="did not answer in time"):
        workers.about(PROBE, 0.001)
    assert _ended(pid)


def test_marked_tests_are_run_and_files_without_the_marker_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_broken.py").write_text("raise ValueError('imported')\n")
    with pytest.raises(NotHereError, match="no test below tests carries the marker gpu"):
        run_marked_tests(tests, 60)
    marked = tests / "test_marked.py"
    marked.write_text("import pytest\n@pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert False\n")
    assert "1 passed, 1 deselected" in run_marked_tests(tests, 60)["summary"]
    marked.write_text("import pytest\n@pytest.mark.gpu\ndef test_a(): assert 1 == 2\n")
    with pytest.raises(MarkedTestsFailedError, match="assert 1 == 2"):
        run_marked_tests(tests, 60)
