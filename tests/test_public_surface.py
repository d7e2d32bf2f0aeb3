"""The names a user imports, and what importing them costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastload
from fastload import errors

PACKAGE = Path(fastload.__file__).parent


@pytest.mark.parametrize("name", fastload.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(fastload, name) is not None
    assert name in dir(fastload)


def test_the_names_are_sorted_and_no_other_is_there() -> None:
    assert fastload.__all__ == sorted(fastload.__all__, key=lambda name: (name != "__version__", name))
    with pytest.raises(AttributeError, match="AutoModle"):
        fastload.AutoModle  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    seen = {alias.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen == fastload._HOMES


def test_the_tree_of_errors_is_the_one_that_is_documented() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        assert name in errors.__doc__
        assert issubclass(getattr(errors, name), errors.FastloadError)


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_fastload_imports_neither_torch_nor_numpy() -> None:
    loaded = modules_after("import fastload")
    assert not loaded & {"torch", "numpy", "tqdm", "safetensors", "accelerate", "huggingface_hub"}


def test_loading_a_local_model_imports_no_library_it_has_no_use_for(tmp_path: Path) -> None:
    config = fastload.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    fastload.BertModel(config).save_pretrained(tmp_path)
    loaded = modules_after(f"import fastload; fastload.AutoModel.from_pretrained({str(tmp_path)!r})")
    assert not loaded & {"transformers", "accelerate", "huggingface_hub", "safetensors", "rich", "tokenizers"}


def test_an_error_says_what_where_and_what_to_do_and_is_caught_as_its_builtin_kind() -> None:
    error = errors.CheckpointNotFoundError("no weights", file="dir", key="a", expected="x", found="y", fix="do z")
    assert str(error) == "no weights\n  file:     dir\n  key:      a\n  expected: x\n  found:    y\n  to do:    do z"
    assert isinstance(error, FileNotFoundError)
    assert (error.file, error.key, error.fix) == ("dir", "a", "do z")
