"""One token after the other.

Memory is laid out before the first step: keys and values, tokens, mask. No step makes a tensor that is larger than the
one before did, and the host waits for a GPU only for what a caller reads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastload.models.cache import KVCache
from fastload.models.generation.prompt import Prompt
from fastload.models.generation.sampling import Rule, draw
from fastload.models.generation.settings import Settings
from fastload.models.generation.stopping import Criterion
from fastload.models.outputs import ModelOutput

__all__ = ["Decoding", "GenerateOutput"]


class GenerateOutput(ModelOutput):
    """What `generate` returns with ``return_dict_in_generate=True``.

    Attributes:
        sequences: [rows, tokens], the prompt's among them.
        scores: for each step [rows, vocabulary], as the token was chosen from them; with ``output_scores=True``.
        logits: the same as the model gave them; with ``output_logits=True``.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None


class Decoding:
    """The texts of one call, and what it takes to go on with them.

    Attributes:
        length: tokens of a text so far, the prompt's and padding included.
    """

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        settings: Settings,
        *,
        limit: int,
        rules: Sequence[Rule],
        criteria: Sequence[Criterion],
        generator: torch.Generator | None,
    ) -> None:
        n_rows, self.length = prompt.tokens.shape
        self._n_prompt = self.length
        device = prompt.tokens.device
        self._model, self._settings, self._generator = model, settings, generator
        self._rules, self._criteria = rules, criteria
        self._limit = limit
        self._scores: list[Tensor] = []
        self._logits: list[Tensor] = []
        # [rows, limit]. Not made in inference mode: a caller may write to the result.
        self._tokens = prompt.tokens.new_empty(n_rows, limit)
        self._tokens[:, : self.length] = prompt.tokens
        self._mask: Tensor | None = None
        if prompt.mask is not None:
            self._mask = torch.ones_like(self._tokens)
            self._mask[:, : self.length] = prompt.mask
        self._positions = prompt.positions
        # Weights that have not arrived will be of the type that the config says. The last token is not looked back at.
        dtype = model.config.dtype if next(model.parameters()).is_meta else model.dtype
        n_heads = getattr(model.base_model, "n_key_heads", None)
        self._cache = KVCache(model.config, n_rows, limit - 1, n_heads=n_heads, dtype=dtype, device=device)
        self._ends = torch.tensor(settings.eos_token_id, dtype=torch.long, device=device)
        self._filler = (
            settings.pad_token_id if settings.pad_token_id is not None else next(iter(settings.eos_token_id), 0)
        )
        self._finished = torch.zeros(n_rows, dtype=torch.bool, device=device)
        # The next step is launched before the host waits for this one. A caller's criteria look at each step in time.
        self._lag = 1 if device.type == "cuda" and not criteria else 0

    @property
    def tokens(self) -> Tensor:
        """The texts so far, [rows, length]; a view."""
        return self._tokens[:, : self.length]

    def result(self) -> Tensor | GenerateOutput:
        """The texts so far, [rows, length], and what else was asked for of their steps."""
        sequences = self.tokens.clone()
        if not self._settings.return_dict_in_generate:
            return sequences
        n_steps = self.length - self._n_prompt
        # Copies, because what was made in inference mode no gradient can go through.
        scores, logits = (
            tuple(step.clone() for step in kept[:n_steps]) or None for kept in (self._scores, self._logits)
        )
        return GenerateOutput(sequences=sequences, scores=scores, logits=logits)

    def run(self) -> Iterator[Tensor]:
        """The new tokens of each step, [rows] on the CPU, until all texts have ended; `length` counts them.

        A row that has ended is filled with the padding token.
        """
        max_time = self._settings.max_time
        deadline = None if max_time is None else time.monotonic() + max_time
        underway: deque[_Arrival] = deque()
        n_begun = self.length
        while n_begun < self._limit or underway:
            if n_begun < self._limit:
                # In inference mode DTensors take every layer apart anew: three times the time for a step.
                with torch.inference_mode() if self._model.tp_size == 1 else torch.no_grad():
                    self._step(n_begun)
                    underway.append(_Arrival(self._tokens[:, n_begun], self._finished.all()))
                n_begun += 1
                if len(underway) <= self._lag and n_begun < self._limit:
                    continue
            tokens, is_over = underway.popleft().wait()
            self.length += 1
            yield tokens
            if is_over or (deadline is not None and time.monotonic() > deadline):
                return

    def _step(self, length: int) -> None:
        """Make the tokens of column ``length``."""
        n_seen = self._cache.length
        output = self._model(
            input_ids=self._tokens[:, n_seen:length],
            attention_mask=None if self._mask is None else self._mask[:, :length],
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        if self._positions is not None:
            self._positions = self._positions[:, -1:] + 1
        logits = output.logits[:, -1].float()
        so_far = self._tokens[:, :length]
        scores = logits
        for rule in self._rules:
            scores = rule(so_far, scores)
        self._keep(scores, logits)
        chosen = draw(scores, self._generator) if self._settings.do_sample else scores.argmax(-1)
        chosen = torch.where(self._finished, self._filler, chosen.to(self._tokens.device))
        self._tokens[:, length] = chosen
        if len(self._ends):
            # torch.isin would wait for a GPU where there are many.
            self._finished |= (chosen[:, None] == self._ends).any(1)
        for criterion in self._criteria:
            self._finished |= _as_rows(criterion(self._tokens[:, : length + 1], tuple(self._scores) or None), chosen)

    def _keep(self, scores: Tensor, logits: Tensor) -> None:
        if self._settings.output_scores:
            self._scores.append(scores)
        if self._settings.output_logits:
            self._logits.append(logits)


def _as_rows(answer: Tensor | bool, like: Tensor) -> Tensor:
    """A criterion's answer, [rows]: older ones say one thing for all."""
    return torch.as_tensor(answer, dtype=torch.bool, device=like.device).expand(like.shape)


class _Arrival:
    """What the host gets of a step: copied without waiting, and waited for when it is looked at."""

    def __init__(self, tokens: Tensor, is_over: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tokens.device.type != "cuda":
            self._tokens, self._is_over = tokens, is_over
            return
        self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._is_over = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._tokens.copy_(tokens, non_blocking=True)
        self._is_over.copy_(is_over, non_blocking=True)
        self._event = torch.cuda.current_stream(tokens.device).record_event()

    def wait(self) -> tuple[Tensor, bool]:
        """The step's tokens, [rows] on the CPU, and whether all texts have ended."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.to("cpu", copy=True), bool(self._is_over)
