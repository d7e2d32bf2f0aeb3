"""Tokenizers and chat templates of a model's folder, as the examples read them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastload.errors import FastloadError, MissingDependencyError, UnreadableFileError
from fastload.examples.tokenizing import as_chat, read_tokenizer
from tests.models.generation.tokenizing import END, byte_level

TEMPLATE = """
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message.content | trim + eos_token }}
    {% if not loop.last %}
    {% continue %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ bos_token }}<|assistant|>
{% endif %}"""
MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer of transformers, which has a token that begins a text and one that ends it."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token=END, chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_tokenizer_is_that_of_the_folder(folder: Path) -> None:
    assert read_tokenizer(str(folder)).encode("the fox").ids == byte_level().encode("the fox").ids


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FastloadError, match="has no tokenizer") as caught:
        read_tokenizer(str(tmp_path))
    assert caught.value.file == str(tmp_path / "tokenizer.json")


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(FastloadError, match="cannot read the tokenizer"):
        read_tokenizer(str(tmp_path))


def test_without_tokenizers_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"fastload\[demo\]"):
        read_tokenizer(str(folder))


def test_without_jinja2_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match="jinja2"):
        as_chat(str(folder), "hello")


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["turns", "marked"])
@pytest.mark.parametrize("place", ["file", "config", "list"])
def test_the_template_is_filled_in_as_transformers_fills_it(folder: Path, template: str, place: str) -> None:
    (folder / "chat_template.jinja").unlink()
    if place == "file":
        (folder / "chat_template.jinja").write_text(template)
    else:
        named = [{"name": "tools", "template": "no"}, {"name": "default", "template": template}]
        change_config(folder, chat_template=template if place == "config" else named)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": " What? "}], tokenize=False, add_generation_prompt=True
    )
    assert as_chat(str(folder), " What? ") == theirs


def test_a_token_may_be_written_as_an_object(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ bos_token }}!")
    change_config(folder, bos_token={"content": "<begin>", "special": True}, eos_token=None)
    assert as_chat(str(folder), "x") == "<begin>!"


def test_a_model_without_a_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(FastloadError, match="no chat template"):
        as_chat(str(folder), "hello")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_an_error_that_says_how(folder: Path, template: str, problem: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(FastloadError, match=problem):
        as_chat(str(folder), "hello")


def test_a_template_that_is_no_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UnreadableFileError, match=r"chat_template\.jinja"):
        as_chat(str(folder), "hello")
