"""Progress is shown to a person who waits, and to nobody else."""

from __future__ import annotations

import io
import os
import pty
import sys

import pytest

from fastload import progress
from fastload.progress import Progress


def shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> str:
    """What a terminal shows while a load of 4,000 bytes has done n_bytes."""
    controller, terminal = pty.openpty()
    with os.fdopen(controller, "rb", buffering=0) as screen, os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress("model", 4000) as bar:
            bar.advance(n_bytes)
            stderr.write("|")
            stderr.flush()
            text = screen.read(10000).decode()
    return text


def test_long_work_on_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOW_AFTER_S", -1.0)
    text = shown_on_a_terminal(monkeypatch, 1000)
    assert "model" in text
    assert "25%" in text


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_on_a_terminal(monkeypatch, 4000) == "|"


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOW_AFTER_S", -1.0)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with Progress("model", 4000) as bar:
        bar.advance(1000)
    assert pipe.getvalue() == ""
