"""What cannot be generated from: an error that names the argument, before the model has run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastload
from fastload.errors import OptionError
from tests.models.generation.causal import VOCABULARY, prompts, save_small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small Llama that must not run."""
    model = fastload.AutoModelForCausalLM.from_pretrained(save_small(tmp_path_factory.mktemp("llama"), eos_token_id=2))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the model was run")

    model.register_forward_pre_hook(refuse)
    return model


def refused(model: Any, *arguments: Any, **options: Any) -> OptionError:
    with pytest.raises(OptionError) as caught:
        model.generate(*arguments, **{"max_new_tokens": 2, **options})
    return caught.value


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (torch.empty(1, 0, dtype=torch.long), "has no tokens"),
        (torch.empty(0, 3, dtype=torch.long), "has no tokens"),
        (torch.tensor([1, 2]), "in rows"),
        (torch.ones(1, 2), "in rows"),
        (torch.ones(1, 2, dtype=torch.bool), "in rows"),
        ([[1, 2]], "in rows"),
        (torch.tensor([[1, VOCABULARY]]), "that the model does not"),
        (torch.tensor([[1, -1]]), "that the model does not"),
    ],
    ids=str,
)
def test_a_prompt_that_is_none(model: Any, tokens: Any, problem: str) -> None:
    error = refused(model, tokens)
    assert problem in error.problem
    assert error.key == "input_ids"
    assert error.expected
    assert error.found


def test_no_prompt_and_nothing_to_begin_with(model: Any) -> None:
    assert "bos_token_id" in str(refused(model, bos_token_id=None))


def test_a_prompt_as_long_as_the_limit(model: Any) -> None:
    error = refused(model, prompts(6)[0], max_length=6, max_new_tokens=None)
    assert (error.key, error.found) == ("max_length", "6 tokens")
    assert "max_new_tokens" in str(error.fix)


def test_a_mask_of_other_tokens(model: Any) -> None:
    tokens, mask = prompts(6, 3)
    assert refused(model, tokens, attention_mask=mask[:, 1:]).key == "attention_mask"
    assert refused(model, tokens, attention_mask=mask.tolist()).found == "list"


def test_padding_on_the_right(model: Any) -> None:
    tokens, mask = prompts(6, 3)
    error = refused(model, tokens.flip(1), attention_mask=mask.flip(1))
    assert error.found == "row 1 ends with padding"
    assert "left" in str(error.expected)
    # The same where the tokens say it.
    assert refused(model, tokens.flip(1)).key == "input_ids"


def test_a_row_of_nothing_but_padding(model: Any) -> None:
    tokens, mask = prompts(6, 3)
    mask[0] = 0
    assert refused(model, tokens, attention_mask=mask).found == "row 0 ends with padding"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_new_tokens", 0),
        ("max_new_token", 3),
        ("token_type_ids", torch.ones(1, 3)),
        ("num_beams", 2),
        ("stop_strings", "END"),
        ("seed", "lucky"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_meant(model: Any, name: str, value: Any) -> None:
    error = refused(model, prompts(3)[0], do_sample=True, **{name: value})
    assert error.key == (name if name != "stop_strings" else "tokenizer")


def test_two_sources_of_samples(model: Any) -> None:
    assert refused(model, prompts(3)[0], do_sample=True, seed=1, generator=torch.Generator()).found == "both"


def test_a_stream_is_refused_when_it_is_asked_for_and_not_when_it_is_read(model: Any) -> None:
    with pytest.raises(OptionError, match="no tokens"):
        model.stream(torch.empty(1, 0, dtype=torch.long))


def test_a_streamer_that_gets_nothing_is_not_ended(model: Any, tmp_path: Path) -> None:
    class Untouched:
        def put(self, value: torch.Tensor) -> None:
            raise AssertionError("nothing was generated")

        def end(self) -> None:
            raise AssertionError("nothing had begun")

    refused(model, prompts(3)[0], streamer=Untouched(), temperature=-1, do_sample=True)
