"""Texts to tokens, for the examples: tokenizer.json through tokenizers, and chat templates through jinja2."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fastload.errors import FastloadError, MissingDependencyError, UnreadableFileError
from fastload.models.config_file import read_config_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["as_chat", "read_tokenizer"]

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"


def read_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a model's folder.

    Raises:
        MissingDependencyError: tokenizers is not installed.
        FastloadError: the folder has no tokenizer.json, or one that tokenizers does not read.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingDependencyError(
            "texts are cut into tokens by tokenizers, which is not installed", fix='pip install "fastload[demo]"'
        ) from None
    file = os.path.join(folder, TOKENIZER_NAME)
    if not os.path.isfile(file):
        raise FastloadError(
            "the model's folder has no tokenizer",
            file=file,
            fix="give a folder that has both; transformers makes the file of older ones: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # tokenizers raises no narrower kind
        raise FastloadError(
            "tokenizers cannot read the tokenizer", file=file, found=str(error), fix="fetch or save the file again"
        ) from error


def as_chat(folder: str, prompt: str) -> str:
    """What a model that was trained to chat is to go on with: the prompt as a user's turn, and its own begun.

    The template comes with the model and runs in jinja2's sandbox.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        FastloadError: the folder has no template, or it fails.
    """
    template, special_tokens = _read_template(folder)
    environment = _environment()
    messages = [{"role": "user", "content": prompt}]
    try:
        filled: str = environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **special_tokens
        )
    except Exception as error:  # a template is a program, and fails in as many ways
        raise FastloadError(
            "the chat template fails", file=folder, found=str(error), fix="leave --chat out, or correct the template"
        ) from error
    return filled


def _environment() -> Any:
    """jinja2 with what transformers lends to templates, so that they come out the same."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingDependencyError(
            "chat templates are filled in by jinja2, which is not installed", fix="pip install jinja2"
        ) from None

    class Generation(Extension):
        """{% generation %} marks what the model said, for training. Here it says nothing."""

        tags = {"generation"}  # noqa: RUF012  as the base declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    return environment


def _read_template(folder: str) -> tuple[str, dict[str, str]]:
    """The chat template of a folder, and the special tokens that it may name."""
    config_file, template_file = (os.path.join(folder, name) for name in (TOKENIZER_CONFIG_NAME, TEMPLATE_NAME))
    config = read_config_file(config_file) if os.path.isfile(config_file) else {}
    template = _default_template(config.get("chat_template"))
    if os.path.isfile(template_file):
        try:
            with open(template_file, encoding="utf-8") as file:
                template = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableFileError(
                "the chat template cannot be read", file=template_file, found=str(error), fix="leave --chat out"
            ) from error
    if template is None:
        raise FastloadError(
            "the model has no chat template",
            file=folder,
            expected=f"{TEMPLATE_NAME}, or chat_template in {TOKENIZER_CONFIG_NAME}",
            fix="leave --chat out, or take a model that was trained to chat",
        )
    return template, _special_tokens(config)


def _default_template(held: Any) -> str | None:
    """The template to chat with; there may be others, for other ends."""
    if isinstance(held, list):
        named = {entry.get("name"): entry.get("template") for entry in held if isinstance(entry, dict)}
        held = named.get("default")
    return held if isinstance(held, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Such as bos_token -> its text. A token is written as text, or as an object that holds it."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
