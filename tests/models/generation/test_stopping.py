"""Texts that end by what they say, by a caller's own criterion, or by the clock."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import transformers

from tests.models.generation.causal import PADDING, prompts, save_small, twins
from tests.models.generation.tokenizing import byte_level


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer of transformers; the one of tokenizers is inside."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Any, Any]:
    """A small Llama with the tokenizer's vocabulary, twice."""
    return twins(save_small(tmp_path_factory.mktemp("llama"), vocab_size=len(tokenizer), num_hidden_layers=2))


def new_tokens(model: Any, tokens: torch.Tensor, **options: Any) -> list[int]:
    made: list[int] = model.generate(tokens, max_new_tokens=24, seed=5, do_sample=True, **options)[0].tolist()
    return made[tokens.shape[1] :]


def test_a_text_ends_with_the_token_that_completes_the_string(pair: tuple[Any, Any], tokenizer: Any) -> None:
    model, (tokens, _) = pair[1], prompts(6)
    whole = new_tokens(model, tokens)
    # From the middle of a token to the middle of another, as a string may lie.
    text = tokenizer.decode(whole[6:9])
    string = text[len(text) // 3 : -1]
    for spoken in (tokenizer, byte_level()):
        made = new_tokens(model, tokens, stop_strings=["nowhere", string], tokenizer=spoken)
        assert made == whole[: len(made)]
        assert string in tokenizer.decode(made)
        assert string not in tokenizer.decode(made[:-1])


def test_it_ends_where_transformers_ends_it(pair: tuple[Any, Any], tokenizer: Any) -> None:
    tokens, mask = prompts(7, 4)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": True, "pad_token_id": PADDING}
    torch.manual_seed(1)
    whole = pair[1].generate(tokens, **options)[:, 7:]
    string = tokenizer.decode(whole[1, 4:6])
    made = []
    for model in pair:
        torch.manual_seed(1)
        # A token that no text has: transformers fills rows only where one could end a text.
        made.append(model.generate(tokens, stop_strings=string, tokenizer=tokenizer, eos_token_id=299, **options))
    assert made[0].tolist() == made[1].tolist()
    assert (made[1][1, -1] == PADDING) | (made[1].shape[1] < 7 + 24)


def test_a_criterion_of_ones_own_ends_each_row_when_it_says_so(pair: tuple[Any, Any]) -> None:
    tokens, mask = prompts(7, 4)

    def stop(so_far: torch.Tensor, scores: Any) -> torch.Tensor:
        return torch.tensor([so_far.shape[1] >= 9, so_far.shape[1] >= 11])

    options = {"attention_mask": mask, "max_new_tokens": 24, "pad_token_id": PADDING}
    plain, made = pair[1].generate(tokens, **options), pair[1].generate(tokens, stopping_criteria=stop, **options)
    assert made.shape[1] == 11
    assert made[1].tolist() == plain[1, :11].tolist()
    assert made[0].tolist() == [*plain[0, :9].tolist(), PADDING, PADDING]


def test_criteria_of_transformers_are_taken(pair: tuple[Any, Any]) -> None:
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(8)])
    made = [model.generate(prompts(5)[0], stopping_criteria=criteria, max_new_tokens=24) for model in pair]
    assert made[1].shape[1] == 8
    assert made[0].tolist() == made[1].tolist()


def test_a_criterion_may_say_one_thing_for_all_rows(pair: tuple[Any, Any]) -> None:
    tokens, mask = prompts(7, 4)
    made = pair[1].generate(
        tokens,
        attention_mask=mask,
        pad_token_id=PADDING,
        stopping_criteria=[lambda so_far, scores: so_far.shape[1] == 9],
        max_new_tokens=24,
    )
    assert made.shape[1] == 9


def test_no_step_begins_after_the_time_is_over(pair: tuple[Any, Any]) -> None:
    model, steps = pair[1], []
    hook = model.lm_head.register_forward_hook(lambda m, i, o: steps.append(time.sleep(0.05)))
    try:
        made = model.generate(prompts(5)[0], max_new_tokens=100, max_time=0.2)
    finally:
        hook.remove()
    assert 1 <= len(steps) <= 6
    assert made.shape[1] == 5 + len(steps)
