"""When a text ends, beside the tokens that end one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastload.errors import OptionError
from fastload.models.generation.settings import Settings
from fastload.models.generation.text import TextPieces

__all__ = ["Criterion", "build_criteria"]

# (tokens so far [rows, length], scores of each step or None) -> which rows end, [rows], or True for all.
# transformers' StoppingCriteria are such.
Criterion: TypeAlias = Callable[[Tensor, Any], Tensor | bool]


def build_criteria(settings: Settings, n_rows: int, tokenizer: Any, extra: Any) -> list[Criterion]:
    """What is asked after each step.

    Args:
        settings: what is asked for.
        n_rows: texts.
        tokenizer: needed for stop strings.
        extra: the caller's own, one or several.

    Raises:
        OptionError: stop strings without a tokenizer, or nothing to fill a row with that ends before others.
    """
    criteria: list[Criterion] = []
    if settings.stop_strings:
        if not hasattr(tokenizer, "decode"):
            raise OptionError(
                "stop strings are found in the text, and only a tokenizer knows the text",
                key="tokenizer",
                expected="tokenizer=, of tokenizers or of transformers",
                found=type(tokenizer).__name__ if tokenizer is not None else "nothing",
            )
        criteria.append(StopStrings(settings.stop_strings, tokenizer, n_rows))
    criteria += [extra] if callable(extra) else extra or ()
    if criteria and n_rows > 1 and settings.filler is None:
        raise OptionError(
            "texts may end one before the other, and nothing says what then fills the row",
            key="pad_token_id",
            expected="pad_token_id=, a token to fill with",
            found="neither that nor an eos_token_id",
        )
    return criteria


class StopStrings:
    """Ends a text once it has one of some strings, which may begin and end in the middle of tokens.

    The prompt is no part of the text. Each step decodes the new token and looks at the end of the text alone.
    """

    def __init__(self, strings: tuple[str, ...], tokenizer: Any, n_rows: int) -> None:
        self._strings = strings
        self._n_overlap = max(map(len, strings)) - 1
        self._pieces = [TextPieces(tokenizer, skip_special_tokens=False) for _ in range(n_rows)]
        self._ends = [""] * n_rows

    def __call__(self, tokens: Tensor, scores: Any = None) -> Tensor:
        """Whether each row [rows] has one of the strings, of which its last token is a part."""
        found = []
        for row, token in enumerate(tokens[:, -1].tolist()):
            text = self._ends[row] + self._pieces[row].put(token)
            found.append(any(string in text for string in self._strings))
            self._ends[row] = text[-self._n_overlap :] if self._n_overlap else ""
        return torch.tensor(found, device=tokens.device)
