"""Running the programs of this folder, which fork, each as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.force.syscalls import why_not

__all__ = ["outcome_of"]

_ROOT = Path(__file__).parents[2]


def outcome_of(program: str, folder: Path) -> Any:
    """What ``python -m tests.force.PROGRAM FOLDER`` prints. Skips, and says why, where calls cannot be traced."""
    if reason := why_not():
        pytest.skip(reason)
    command = [sys.executable, "-m", f"tests.force.{program}", str(folder)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)
