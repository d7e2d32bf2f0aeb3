"""Small models of families that load in different ways, with random values in every tensor that is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
MOE = LLAMA | {"head_dim": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
# Sizes of one family's own names.
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
}
VIT = IMAGES | {"patch_size": 8}
WHISPER = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
DEEPSEEK = MOE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# The model class of a family, and what its config says.
FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "bert": ("BertForMaskedLM", lambda: transformers.BertConfig(**TEXT)),
    "gpt2": ("GPT2LMHeadModel", lambda: transformers.GPT2Config(**GPT2)),
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**LLAMA)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", lambda: transformers.Qwen3MoeConfig(**MOE, num_experts=6)),
    "mixtral": ("MixtralForCausalLM", lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4)),
    "deepseek_v3": ("DeepseekV3ForCausalLM", lambda: transformers.DeepseekV3Config(**DEEPSEEK)),
    # Keeps a layer in float32, whatever is asked for.
    "t5": ("T5ForConditionalGeneration", lambda: transformers.T5Config(**T5)),
    "vit": ("ViTForImageClassification", lambda: transformers.ViTConfig(**VIT)),
    "clip": (
        "CLIPModel",
        lambda: transformers.CLIPConfig(text_config=TEXT | {"projection_dim": 16}, vision_config=VIT),
    ),
    "whisper": ("WhisperForConditionalGeneration", lambda: transformers.WhisperConfig(**WHISPER)),
    # Its files name the parts in another order than the model does.
    "llava": (
        "LlavaForConditionalGeneration",
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**LLAMA),
            vision_config=transformers.CLIPVisionConfig(**VIT),
            image_token_index=90,
        ),
    ),
}


def model_class(family: str) -> Any:
    return getattr(transformers, FAMILIES[family][0])


def build(family: str, class_name: str | None = None, seed: int = 0, **fields: Any) -> Any:
    """A small model. Fresh ones have norms of ones and biases of zeros, which would hide what is mixed up.

    Args:
        family: of `FAMILIES`.
        class_name: another class than the family's own.
        seed: of all values.
        fields: of the config.
    """
    config = FAMILIES[family][1]()
    for name, value in fields.items():
        setattr(config, name, value)
    return randomised(getattr(transformers, class_name or FAMILIES[family][0])(config), seed)


def randomised(model: Any, seed: int = 0) -> Any:
    """The model, with random values in every floating tensor that is stored."""
    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for tensor in dict.fromkeys(stored.values()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 - 0.1)
    return model.eval()
