"""The same small decoder twice, from one checkpoint that transformers has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import fastload

VOCABULARY = 89
PADDING, BEGIN = 0, 1
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large enough for tokens to be far from equally likely: a tie would be decided by rounding.
    "initializer_range": 0.3,
    "pad_token_id": PADDING,
    "bos_token_id": BEGIN,
    "eos_token_id": None,
}
# A head that is the embedding, in a model that has learned nothing, says each token again.
UNTIED: dict[str, Any] = {"head_dim": 8, "tie_word_embeddings": False}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
# Name of the class -> fields of its config.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma": UNTIED,
    "Gemma2": {"sliding_window": 4, **UNTIED},
    "Gemma3": {"sliding_window": 4, **UNTIED},
    "Mixtral": {"num_local_experts": 4, **EXPERTS},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, **EXPERTS},
}


def save_small(folder: Path, family: str = "Llama", **fields: Any) -> Path:
    """A checkpoint of random weights, written by transformers."""
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(**{**SMALL, **FAMILIES[family], **fields})
    torch.manual_seed(len(family))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder)
    return folder


def twins(folder: Path) -> tuple[Any, Any]:
    """transformers' model of a checkpoint, and fastload's."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder), fastload.AutoModelForCausalLM.from_pretrained(
        folder
    )


def prompts(*lengths: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of these lengths, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    tokens = torch.randint(2, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return tokens.masked_fill(mask == 0, PADDING), mask
