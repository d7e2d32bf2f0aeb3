"""Running the programs of this folder, which fork, each as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

__all__ = ["outcome_of"]

_ROOT = Path(__file__).parents[2]


def outcome_of(program: str, folder: Path, *, traces: bool = True, room: str = "force") -> Any:
    """What ``python -m tests.ROOM.PROGRAM FOLDER`` prints.

    Args:
        program: its name.
        folder: where it works.
        traces: it traces system calls. Where that cannot be done the test is skipped, with the reason.
        room: the folder of tests that has the program.
    """
    if traces and (reason := _output_of("tests.force.syscalls").strip()):
        pytest.skip(reason)
    return json.loads(_output_of(f"tests.{room}.{program}", str(folder)))


def _output_of(program: str, *arguments: str) -> str:
    command = [sys.executable, "-m", program, *arguments]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
