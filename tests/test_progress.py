"""Progress is shown to a person who waits, and to nobody else."""

from __future__ import annotations

import io
import os
import pty
import sys

import pytest

from fastload import progress
from fastload.progress import Progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> int:
    """stderr becomes a terminal; what it shows can be read from the descriptor."""
    controller, terminal = pty.openpty()
    monkeypatch.setattr(sys, "stderr", os.fdopen(terminal, "w"))
    os.set_blocking(controller, False)
    return controller


def shown(controller: int) -> str:
    sys.stderr.flush()
    try:
        return os.read(controller, 10000).decode()
    except BlockingIOError:
        return ""


def test_long_work_on_a_terminal_shows_a_bar(terminal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOW_AFTER_S", -1.0)
    with Progress("model", 4000) as bar:
        bar.advance(1000)
        text = shown(terminal)
    assert "model" in text
    assert "25%" in text


def test_short_work_shows_nothing(terminal: int) -> None:
    with Progress("model", 4000) as bar:
        bar.advance(4000)
    assert shown(terminal) == ""


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOW_AFTER_S", -1.0)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with Progress("model", 4000) as bar:
        bar.advance(1000)
    assert pipe.getvalue() == ""
