"""The same small BERT twice, with the same random weights: transformers' and fastload's."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from fastload.models import bert, bert_heads
from fastload.models.base import PreTrainedModel
from fastload.models.bert_config import BertConfig

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    # Large enough for errors to show, unlike the 0.02 of real models.
    "initializer_range": 0.3,
}
HEADS = [name for name in bert_heads.__all__ if name != "BertLMHeadModel"]
DECODER: dict[str, Any] = {"is_decoder": True}
CROSS: dict[str, Any] = {"is_decoder": True, "add_cross_attention": True}


def native_class(name: str) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = getattr(bert if name == "BertModel" else bert_heads, name)
    return found


def twins(name: str, eager: bool = False, **fields: Any) -> tuple[Any, PreTrainedModel]:
    """transformers' model and fastload's, in eval mode. ``eager`` is for transformers, which needs it for weights."""
    torch.manual_seed(0)
    attention = {"attn_implementation": "eager"} if eager else {}
    theirs = getattr(transformers, name)(transformers.BertConfig(**{**SMALL, **fields}, **attention)).eval()
    # Biases begin at zero and norms at one, which would hide mistakes.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = native_class(name)(BertConfig(**{**SMALL, **fields})).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def padding_mask(batch: int, length: int, kept: int) -> torch.Tensor:
    """The last text is ``kept`` tokens long, the others fill the batch."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, kept:] = 0
    return mask


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """The same fields, and in them the same numbers."""
    assert set(ours) == set(theirs)
    for name in theirs:
        if name != "past_key_values":
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
