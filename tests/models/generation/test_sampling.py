"""The choice of a token: the same tokens survive as in transformers, and the same are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from fastload.models.generation.generation_config import GenerationConfig
from fastload.models.generation.sampling import build_rules, draw
from fastload.models.generation.settings import Settings

N_ROWS, N_VOCABULARY, N_PROMPT = 4, 97, 6


def settings(**fields: Any) -> Settings:
    return Settings.of(GenerationConfig(), None, {"do_sample": True, "top_k": 0, **fields})


def random_scores(seed: int, ties: bool) -> torch.Tensor:
    scores = torch.randn(N_ROWS, N_VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    # As a model in bfloat16 gives them: many are equal.
    return (scores * 2).round() / 2 if ties else scores


def random_tokens(length: int = N_PROMPT) -> torch.Tensor:
    return torch.randint(0, N_VOCABULARY, (N_ROWS, length), generator=torch.Generator().manual_seed(5))


CASES: list[tuple[dict[str, Any], list[theirs.LogitsProcessor]]] = [
    ({"temperature": 0.6}, [theirs.TemperatureLogitsWarper(0.6)]),
    ({"temperature": 3.0}, [theirs.TemperatureLogitsWarper(3.0)]),
    ({"top_k": 1}, [theirs.TopKLogitsWarper(1)]),
    ({"top_k": 10}, [theirs.TopKLogitsWarper(10)]),
    ({"top_k": 1000}, [theirs.TopKLogitsWarper(1000)]),
    ({"top_p": 0.9}, [theirs.TopPLogitsWarper(0.9)]),
    ({"top_p": 1e-6}, [theirs.TopPLogitsWarper(1e-6)]),
    ({"min_p": 0.1}, [theirs.MinPLogitsWarper(0.1)]),
    ({"min_p": 0}, [theirs.MinPLogitsWarper(0)]),
    ({"min_p": 1.0}, [theirs.MinPLogitsWarper(1.0)]),
    ({"repetition_penalty": 1.7}, [theirs.RepetitionPenaltyLogitsProcessor(1.7)]),
    ({"repetition_penalty": 0.5}, [theirs.RepetitionPenaltyLogitsProcessor(0.5)]),
    (
        {"min_new_tokens": 3, "eos_token_id": [4, 5]},
        [theirs.MinNewTokensLengthLogitsProcessor(N_PROMPT, 3, [4, 5])],
    ),
    ({"min_length": N_PROMPT + 1, "eos_token_id": 4}, [theirs.MinLengthLogitsProcessor(N_PROMPT + 1, 4)]),
    (
        {"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
        [
            theirs.RepetitionPenaltyLogitsProcessor(1.2),
            theirs.TemperatureLogitsWarper(0.7),
            theirs.TopKLogitsWarper(30),
            theirs.TopPLogitsWarper(0.8),
            theirs.MinPLogitsWarper(0.05),
        ],
    ),
]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(("fields", "processors"), CASES, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_scores_become_what_transformers_makes_of_them(
    fields: dict[str, Any], processors: list[theirs.LogitsProcessor], ties: bool
) -> None:
    rules = build_rules(settings(**fields), N_PROMPT, None, [])
    stock = LogitsProcessorList(processors)
    tokens = random_tokens(N_PROMPT + 4)
    for step in range(5):
        so_far, scores = tokens[:, : N_PROMPT + step], random_scores(step, ties)
        expected, ours = stock(so_far, scores.clone()), scores
        for rule in rules:
            ours = rule(so_far, ours)
        assert torch.equal(ours, expected)


def test_padding_is_no_repetition() -> None:
    mask = torch.ones(N_ROWS, N_PROMPT, dtype=torch.long)
    mask[1, :3] = 0
    tokens, scores = random_tokens(), random_scores(0, False)
    (rule,) = build_rules(settings(repetition_penalty=1.5), N_PROMPT, mask, [])
    stock = theirs.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.tensor([0, 3, 0, 0]))
    assert torch.equal(rule(tokens, scores), stock(tokens, scores))


def test_tokens_that_the_head_does_not_score_are_passed_over() -> None:
    tokens = torch.full((N_ROWS, N_PROMPT), N_VOCABULARY + 7)
    scores = random_scores(0, False)
    (rule,) = build_rules(settings(repetition_penalty=1.5), N_PROMPT, None, [])
    assert torch.equal(rule(tokens, scores), scores)


def test_without_sampling_only_the_penalties_count() -> None:
    fields = {"do_sample": False, "temperature": 0.5, "top_k": 3, "top_p": 0.4, "min_p": 0.2}
    assert build_rules(Settings.of(GenerationConfig(**fields), None, {}), N_PROMPT, None, []) == []


def test_rules_of_ones_own_come_after_the_penalties_and_before_the_temperature() -> None:
    def own(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores

    rules = build_rules(settings(repetition_penalty=1.5, temperature=0.5), N_PROMPT, None, [own])
    assert rules.index(own) == 1
    assert len(rules) == 3


def test_the_tokens_drawn_are_those_of_torch() -> None:
    for seed in range(20):
        scores = random_scores(seed, False)
        drawn = draw(scores, torch.Generator().manual_seed(seed))
        expected = torch.multinomial(scores.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))
        assert drawn.tolist() == expected[:, 0].tolist()


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0])
    scores = shares.log().expand(20_000, 4)
    counts = torch.bincount(draw(scores, torch.Generator().manual_seed(0)), minlength=4)
    assert counts[3] == 0
    torch.testing.assert_close(counts / len(scores), shares, atol=0.015, rtol=0)
