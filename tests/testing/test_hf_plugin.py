"""The pytest plugin: fastload is on for the whole run, and says in the end what it did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

SUITE = """
import fastload.hf
import pytest
import torch
from transformers import BertConfig, BertModel

CONFIG = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    BertModel(CONFIG).save_pretrained(folder)
    return folder


def test_a_load_from_a_folder_is_fast(folder):
    before = fastload.hf.stats().fast_loads
    BertModel.from_pretrained(folder)
    assert fastload.hf.stats().fast_loads == before + {fast}


def test_a_load_of_nothing_is_handed_over():
    with pytest.raises(ValueError, match="checkpoint files"):
        BertModel.from_pretrained(None, config=CONFIG, dtype=torch.float32)
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A folder with tests of a stranger, who knows nothing of this repository's settings."""
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, where pytest has no other plugins than it is told of."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_run_with_the_plugin_loads_by_fastload_and_says_so_at_the_end(suite: Path) -> None:
    (suite / "test_theirs.py").write_text(SUITE.replace("{fast}", "1"))
    done = run(["-m", "pytest", "-p", "fastload.testing.hf_plugin"], suite)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.partition("= fastload =")[2]
    assert "1 loads by fastload, 1 handed over" in summary
    assert "1 x no weights" in summary


def test_a_run_without_the_plugin_is_left_alone(suite: Path) -> None:
    (suite / "test_theirs.py").write_text(SUITE.replace("{fast}", "0"))
    done = run(["-m", "pytest"], suite)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fastload" not in done.stdout


def test_transformers_is_what_it_was_when_the_run_has_ended(suite: Path) -> None:
    (suite / "test_theirs.py").write_text("def test_nothing(): pass")
    script = (
        "import pytest, transformers\n"
        "names = ('from_pretrained', 'save_pretrained', '_load_pretrained_model', '_finalize_model_loading')\n"
        "before = [vars(transformers.PreTrainedModel)[name] for name in names]\n"
        "assert pytest.main(['-p', 'fastload.testing.hf_plugin']) == 0\n"
        "assert before == [vars(transformers.PreTrainedModel)[name] for name in names]\n"
    )
    done = run(["-c", script], suite)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_plugin_imports_neither_torch_nor_transformers_nor_pytest() -> None:
    script = "import sys, fastload.testing.hf_plugin\nprint(*sys.modules)"
    done = run(["-c", script], ROOT)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"torch", "numpy", "transformers", "pytest", "rich"}
