"""Progress is shown to a person who waits, and to nobody else."""

from __future__ import annotations

import io
import sys

import pytest

from fastload import progress
from fastload.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, n_bytes: int) -> str:
    """What stderr got while a load of 4,000 bytes has done n_bytes."""
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress("model", 4000) as bar:
        bar.advance(n_bytes)
        return stderr.getvalue()


def test_long_work_on_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOW_AFTER_S", -1.0)
    text = shown(monkeypatch, Terminal(), 1000)
    assert "model" in text
    assert "25%" in text


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), 4000) == ""


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOW_AFTER_S", -1.0)
    assert shown(monkeypatch, io.StringIO(), 1000) == ""
