"""What the pytest-benchmark suites share: checkpoints, and the hash that every loader must reproduce."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from suite.checkpoints import bert_base, warm_up
from suite.fingerprint import fingerprint


@pytest.fixture(scope="session")
def bert_folders() -> dict[str, Path]:
    """BERT-base in fp32 by file format, the files in the page cache."""
    folders = {file_format: bert_base(file_format) for file_format in ("safetensors", "bin")}
    for folder in folders.values():
        warm_up(folder)
    return folders


@pytest.fixture(scope="session")
def bert_digest(bert_folders: dict[str, Path]) -> str:
    """The hash of BERT-base's weights as safetensors' own reader gives them."""
    return fingerprint(load_file(bert_folders["safetensors"] / "model.safetensors"))
