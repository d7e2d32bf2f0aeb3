"""From the scores of a vocabulary to the next token.

Each function takes scores [rows, vocabulary] in float32 and returns new ones; a token that is out of the question has
minus infinity. Which tokens survive is what transformers' processors decide, ties included, so that the
distribution is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastload.models.generation.settings import Settings

__all__ = ["Rule", "build_rules", "draw", "keep_min_p", "keep_top_k", "keep_top_p"]

# (tokens so far [rows, length], scores [rows, vocabulary]) -> scores. transformers' LogitsProcessors are such.
Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def build_rules(settings: Settings, n_prompt: int, mask: Tensor | None, extra: Sequence[Rule]) -> list[Rule]:
    """What happens to the scores of each step, in order.

    Args:
        settings: what is asked for.
        n_prompt: tokens of the prompt, padding included.
        mask: [rows, n_prompt], 0 for padding; None where there is none.
        extra: the caller's own rules. They come before those that sampling needs.
    """
    rules: list[Rule] = []
    if settings.repetition_penalty != 1:
        rules.append(RepetitionPenalty(settings.repetition_penalty, mask))
    shortest = settings.first_length_with_eos(n_prompt)
    if settings.eos_token_id and shortest > n_prompt:
        rules.append(NoEndBefore(shortest, settings.eos_token_id))
    rules += extra
    if not settings.do_sample:
        return rules
    if settings.temperature != 1:
        rules.append(lambda tokens, scores: scores / settings.temperature)
    if settings.top_k:
        rules.append(lambda tokens, scores: keep_top_k(scores, settings.top_k))
    if settings.top_p < 1:
        rules.append(lambda tokens, scores: keep_top_p(scores, settings.top_p))
    min_p = settings.min_p
    if min_p is not None:
        rules.append(lambda tokens, scores: keep_min_p(scores, min_p))
    return rules


class RepetitionPenalty:
    """Makes tokens less likely that the text has already: positive scores divided, negative ones multiplied.

    https://arxiv.org/abs/1909.05858. Which tokens a text has is kept in one mask that each step adds to, so that a step
    takes the same time however long the text is.
    """

    def __init__(self, penalty: float, mask: Tensor | None) -> None:
        self._penalty = penalty
        self._mask = mask
        self._seen: Tensor | None = None

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        n_vocabulary = scores.shape[1]
        if self._seen is None:
            # Padding, and tokens that the head does not score, are noted in a column of their own.
            self._seen = torch.zeros(len(scores), n_vocabulary + 1, dtype=torch.bool, device=scores.device)
            if self._mask is not None:
                tokens = tokens.masked_fill(self._mask == 0, n_vocabulary)
        else:
            tokens = tokens[:, -1:]
        self._seen.scatter_(1, tokens.clamp(max=n_vocabulary).to(scores.device), True)
        penalised = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        return torch.where(self._seen[:, :n_vocabulary], penalised, scores)


class NoEndBefore:
    """Keeps the tokens that end a text out of the question until it has ``shortest`` tokens."""

    def __init__(self, shortest: int, ends: Sequence[int]) -> None:
        self._shortest = shortest
        self._ends = ends
        self._mask: Tensor | None = None

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        if tokens.shape[1] >= self._shortest:
            return scores
        if self._mask is None:
            numbers = torch.arange(scores.shape[1], device=scores.device)
            self._mask = torch.isin(numbers, torch.tensor(self._ends, device=scores.device))
        return scores.masked_fill(self._mask, -math.inf)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """The k most likely tokens, and those as likely as the last of them."""
    least = torch.topk(scores, min(k, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < least, -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """The fewest tokens that have the share p of the probability together (https://arxiv.org/abs/1904.09751)."""
    rising, order = torch.sort(scores)
    is_out = rising.softmax(-1).cumsum(-1) <= 1 - p
    is_out[:, -1] = False
    return scores.masked_fill(is_out.scatter(1, order, is_out), -math.inf)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """The tokens at least p times as likely as the likeliest (https://arxiv.org/abs/2407.01082)."""
    shares = scores.softmax(-1)
    return scores.masked_fill(shares < p * shares.amax(-1, keepdim=True), -math.inf)


def draw(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token a row [rows], each with its probability.

    The token whose share, divided by a random time, is largest: of clocks that ring at these rates, the first. It is
    how torch.multinomial draws a single sample, and gives the same tokens, but does not wait for the device.
    """
    shares = scores.softmax(-1)
    return (shares / torch.empty_like(shares).exponential_(generator=generator)).argmax(-1)
