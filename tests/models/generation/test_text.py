"""Text that is decoded while it grows, and texts that end by what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from fastload import GenerationConfig
from fastload.errors import OptionError
from fastload.models.generation.settings import Settings
from fastload.models.generation.stopping import StopStrings, build_criteria
from fastload.models.generation.text import TextPieces
from tests.models.generation.tokenizing import END, TEXTS, byte_level, word_level

TOKENIZERS = pytest.mark.parametrize("tokenizer", [byte_level(), word_level()], ids=["bytes", "words"])


def pieces_of(tokenizer: Tokenizer, tokens: list[int], **options: Any) -> list[str]:
    pieces = TextPieces(tokenizer, **options)
    return [*(pieces.put(token) for token in tokens), pieces.end()]


@TOKENIZERS
@pytest.mark.parametrize("text", TEXTS[:3])
def test_the_pieces_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert len(pieces) >= 5


def test_a_character_comes_when_it_is_whole() -> None:
    tokenizer = byte_level(n_tokens=260)
    tokens = tokenizer.encode("a🎉b").ids
    assert len(tokens) == 6
    assert pieces_of(tokenizer, tokens) == ["a", "", "", "", "🎉", "b", ""]


def test_a_character_that_never_gets_whole_is_not_waited_for() -> None:
    tokenizer = byte_level(n_tokens=260)
    begun = tokenizer.encode("🎉").ids[:1]
    assert pieces_of(tokenizer, begun) == ["", "�"]
    pieces = pieces_of(tokenizer, begun * 20)
    assert "".join(pieces) == "�" * 20
    assert pieces.index("�" * 9) == 8


def test_special_tokens_are_left_out_on_request() -> None:
    tokenizer = byte_level()
    tokens = [*tokenizer.encode("dog").ids, tokenizer.token_to_id(END)]
    assert "".join(pieces_of(tokenizer, tokens)) == "dog"
    assert "".join(pieces_of(tokenizer, tokens, skip_special_tokens=False)) == "dog" + END


def steps_to_stop(tokenizer: Tokenizer, text: str, *strings: str) -> int | None:
    """After how many tokens of a text a stop string is found."""
    tokens = torch.tensor([tokenizer.encode(text).ids])
    criterion = StopStrings(strings, tokenizer, 1)
    answers = [bool(criterion(tokens[:, : n + 1])) for n in range(tokens.shape[1])]
    return answers.index(True) + 1 if True in answers else None


@TOKENIZERS
@pytest.mark.parametrize("string", ["stop", "top a", "p", " at the", "stop at the stop sign", "n"])
def test_a_text_ends_with_the_token_that_completes_a_string(tokenizer: Tokenizer, string: str) -> None:
    text = TEXTS[1]
    n_steps = steps_to_stop(tokenizer, text, "nowhere", string)
    assert n_steps is not None
    tokens = tokenizer.encode(text).ids
    assert string in tokenizer.decode(tokens[:n_steps])
    assert string not in tokenizer.decode(tokens[: n_steps - 1])


def test_a_text_without_the_string_goes_on() -> None:
    assert steps_to_stop(byte_level(), TEXTS[0], "cat", "stop") is None


def test_a_special_token_may_be_a_stop_string() -> None:
    assert steps_to_stop(byte_level(), f"fox{END}dog", END) == len(byte_level().encode(f"fox{END}").ids)


def test_each_row_ends_on_its_own() -> None:
    tokenizer = byte_level()
    rows = [tokenizer.encode(text).ids[:4] for text in ("stop it", "the quick brown fox")]
    criterion = StopStrings(("st",), tokenizer, 2)
    ended = torch.stack([criterion(torch.tensor(rows)[:, : n + 1]) for n in range(4)]).any(0)
    assert ended.tolist() == [True, False]


def settings(**fields: Any) -> Settings:
    return Settings.of(GenerationConfig(), None, fields)


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(OptionError, match="only a tokenizer knows the text"):
        build_criteria(settings(stop_strings="a"), 1, None, None)


def test_rows_that_may_end_early_need_something_to_fill_them() -> None:
    def never(tokens: torch.Tensor, scores: Any) -> bool:
        return False

    assert build_criteria(settings(), 1, None, never) == [never]
    assert build_criteria(settings(eos_token_id=3), 2, None, [never]) == [never]
    with pytest.raises(OptionError, match="pad_token_id"):
        build_criteria(settings(), 2, None, [never])
