"""The texts that generation begins with, checked before the model sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastload.errors import OptionError
from fastload.models.generation.settings import Settings

__all__ = ["Prompt", "prepare_prompt"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The beginnings of a batch of texts.

    Attributes:
        tokens: [rows, length], padded on the left.
        mask: the same shape, 0 for padding and 1 for text; None where there is no padding.
    """

    tokens: Tensor
    mask: Tensor | None

    @property
    def positions(self) -> Tensor | None:
        """Each token's place in its text [rows, length]; None where it is its place in the row."""
        if self.mask is None:
            return None
        return (self.mask.cumsum(-1) - 1).clamp(min=0)


def prepare_prompt(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    settings: Settings,
    *,
    n_vocabulary: int,
    device: torch.device,
) -> Prompt:
    """What a caller gave, as the model takes it: one row for each text to be made.

    Args:
        input_ids: [rows, length]; None to begin with the token that begins a text.
        attention_mask: the same shape, 0 for padding. Without one, tokens that are the padding token are padding,
            unless that token also ends a text.
        settings: special tokens, and texts to be made of each row.
        n_vocabulary: tokens that the model knows.
        device: where the model is.

    Raises:
        OptionError: no tokens, unknown ones, other shapes, or padding on the right.
    """
    if input_ids is None:
        tokens, mask = _beginning(settings), None
    else:
        tokens = _checked_tokens(input_ids, n_vocabulary)
        mask = _inferred_mask(tokens, settings) if attention_mask is None else _checked_mask(attention_mask, tokens)
    n_copies = settings.num_return_sequences
    tokens = tokens.to(device, torch.long).repeat_interleave(n_copies, 0)
    if mask is None or bool(mask.all()):
        return Prompt(tokens, None)
    if not bool(mask[:, -1].all()):
        raise OptionError(
            "a text is padded on the right, where it is to go on",
            key="input_ids" if attention_mask is None else "attention_mask",
            expected="padding on the left of each row, and at least one token",
            found=f"row {int(mask[:, -1].long().argmin())} ends with padding",
            fix="pad on the left; or, if these tokens are text, pass an attention_mask of ones",
        )
    return Prompt(tokens, mask.to(device, torch.long).repeat_interleave(n_copies, 0))


def _beginning(settings: Settings) -> Tensor:
    if settings.bos_token_id is None:
        raise OptionError(
            "there is nothing to begin with",
            key="input_ids",
            expected="tokens, or a bos_token_id in the generation config",
            found="neither",
        )
    return torch.tensor([[settings.bos_token_id]])


def _checked_tokens(tokens: Tensor, n_vocabulary: int) -> Tensor:
    shape = f"a tensor of the shape {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        dtype = f" of {str(tokens.dtype).removeprefix('torch.')}" if isinstance(tokens, Tensor) else ""
        raise OptionError(
            "tokens are numbers in rows",
            key="input_ids",
            expected="a tensor of whole numbers, [texts, tokens]",
            found=shape + dtype,
        )
    if not tokens.numel():
        raise OptionError(
            "the prompt has no tokens",
            key="input_ids",
            expected="at least one text of at least one token",
            found=shape,
            fix="leave input_ids out to begin with the token that begins a text",
        )
    # One question, not two: on a GPU each answer is waited for.
    least, most = torch.stack(tokens.aminmax()).tolist()
    if least < 0 or most >= n_vocabulary:
        raise OptionError(
            "the prompt has tokens that the model does not",
            key="input_ids",
            expected=f"numbers from 0 to {n_vocabulary - 1:,}",
            found=str(least if least < 0 else most),
            fix="use the tokenizer that belongs to the model",
        )
    return tokens


def _checked_mask(mask: Tensor, tokens: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        raise OptionError(
            "the attention mask is not one of these tokens",
            key="attention_mask",
            expected=f"a tensor of the shape {list(tokens.shape)}",
            found=f"one of {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__,
        )
    return mask != 0


def _inferred_mask(tokens: Tensor, settings: Settings) -> Tensor | None:
    padding = settings.pad_token_id
    return None if padding is None or padding in settings.eos_token_id else tokens != padding
