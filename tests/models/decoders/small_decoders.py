"""Small decoders of every family, written by transformers, with weights that make mistakes show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastload

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each family needs to show what is its own. Windows are shorter than the texts of the tests.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"attention_bias": True},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "gemma": {},
    "gemma2": {
        "sliding_window": 5,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 5.0,
    },
}
DENSE = [name for name in FAMILIES if name not in ("mixtral", "qwen3_moe")]
WITH_EXPERTS = ["mixtral", "qwen3_moe"]


def their_config(family: str, **fields: Any) -> Any:
    return transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **fields})


def their_model(family: str, task: str = "AutoModelForCausalLM", *, seed: int = 0, **fields: Any) -> Any:
    """transformers' model, in eval mode. Initial weights are too small for errors to show, and norms are all alike."""
    model = getattr(transformers, task).from_config(their_config(family, **fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model


def pair(folder: Path, family: str, task: str = "AutoModelForCausalLM", **fields: Any) -> tuple[Any, Any]:
    """transformers' model, and fastload's, loaded from what the other wrote."""
    theirs = their_model(family, task, **fields)
    theirs.save_pretrained(folder)
    ours = getattr(fastload, task).from_pretrained(folder, strict=True)
    assert type(ours).__module__ == "fastload.models.decoder_families"
    assert type(ours).__name__ == type(theirs).__name__
    return theirs, ours


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Numbers of tokens, none of them one of the special ones."""
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def left_padded(length: int, *kept: int) -> dict[str, torch.Tensor]:
    """Texts of so many tokens each, padded on the left, with mask and positions as a generation has them."""
    input_ids = tokens(len(kept), length)
    mask = torch.stack([(torch.arange(length) >= length - n).long() for n in kept])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids.masked_fill(mask == 0, 0), "attention_mask": mask, "position_ids": positions}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


each_family = pytest.mark.parametrize("family", FAMILIES)
