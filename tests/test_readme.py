"""The README is true: its snippets run, and its map has every file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastload

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_snippets_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = fastload.BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    for folder in ("trained", "small"):
        fastload.BertModel(config).save_pretrained(folder)
    exec(SNIPPETS[number].replace("path-or-hub-id", "trained"), {})


def test_the_map_has_every_file_and_no_other() -> None:
    mapped = set(re.findall(r"^\| `(\w+/[\w/]*\.py)` \|", README, flags=re.MULTILINE))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "fastload").rglob("*.py") if path.read_text().strip()}
    assert mapped == there
