"""Running commands, and checkpoints of a few kilobytes for them to work on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastload import BertConfig, BertModel
from fastload.cli import main


class Outcome(NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str

    @property
    def values(self) -> Any:
        """What it printed, read as JSON."""
        return json.loads(self.out)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def process() -> Callable[..., Outcome]:
    """Runs ``python ARGUMENTS`` in a process of its own, its output piped."""

    def run(*arguments: object) -> Outcome:
        texts = [str(argument) for argument in arguments]
        done = subprocess.run([sys.executable, *texts], capture_output=True, text=True, timeout=120, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a BERT of two layers and random weights, in one safetensors file."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    folder = tmp_path / "bert"
    BertModel(config).save_pretrained(folder)
    return folder
