"""The tests that need a GPU, run where there is one."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from suite.fresh import job_environment

from gpu_suite.schedule import NotHereError

__all__ = ["MarkedTestsFailedError", "run_marked_tests"]

_MARK = "mark.gpu"
_MOST_CHARACTERS = 1200


class MarkedTestsFailedError(AssertionError):
    """Some of the tests failed. The message has the end of what they printed."""


def run_marked_tests(tests: Path, timeout_s: float) -> dict[str, Any]:
    """Run those below a folder that carry the marker ``gpu``; files without it are not even imported.

    Returns:
        ``summary``: pytest's last line, with what passed and what was skipped.

    Raises:
        NotHereError: there are none, or no pytest.
        MarkedTestsFailedError: some failed.
        subprocess.TimeoutExpired: they took too long, and were ended.
    """
    if find_spec("pytest") is None:
        raise NotHereError("pytest is not installed")
    files = [str(file) for file in sorted(tests.rglob("test_*.py")) if _MARK in file.read_text()]
    if not files:
        raise NotHereError(f"no test below {tests.name} carries the marker gpu")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command,
        cwd=tests.parent,
        env=job_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise MarkedTestsFailedError(f"pytest ended with {done.returncode}\n{done.stdout[-_MOST_CHARACTERS:]}")
    return {"summary": done.stdout.strip().splitlines()[-1], "n_files": len(files)}
