"""Small models for transformers' own checks: its source distribution has the checks, but not the models' test files.

Each row is a family that loads differently: heads on a base model, tied heads, fused experts, Conv1D, weight norm,
running statistics, several towers, legacy names, modules kept in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

__all__ = ["BATCH", "FAMILIES", "IMAGE", "LENGTH", "Family", "Inputs"]

BATCH, LENGTH, IMAGE, AUDIO, FRAMES = 2, 7, 32, 4000, 60
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Family:
    """A model type, sizes that make it small, its classes, and a maker of inputs.

    Attributes:
        sizes: arguments of the config class.
        classes: names of model classes, the base class first.
        inputs: makes what the classes' forward takes.
        traits: attributes of the checks' class, such as `has_attentions`.
    """

    model_type: str
    sizes: dict[str, Any]
    classes: tuple[str, ...]
    inputs: Callable[[], Inputs]
    traits: dict[str, Any] = field(default_factory=dict)

    def config(self) -> transformers.PreTrainedConfig:
        return transformers.AutoConfig.for_model(self.model_type, **self.sizes)

    def model_classes(self) -> tuple[type[transformers.PreTrainedModel], ...]:
        return tuple(getattr(transformers, name) for name in self.classes)


def text() -> Inputs:
    return {"input_ids": torch.randint(5, 90, (BATCH, LENGTH)), "attention_mask": torch.ones(BATCH, LENGTH).long()}


def text_pair() -> Inputs:
    given = text()
    given["input_ids"][:, -1] = 1  # T5's classifier reads where a text ends; 1 is its end
    return given | {"decoder_input_ids": torch.randint(5, 90, (BATCH, LENGTH))}


def image() -> Inputs:
    return {"pixel_values": torch.rand(BATCH, 3, IMAGE, IMAGE)}


def image_and_text() -> Inputs:
    return image() | text()


def waveform() -> Inputs:
    return {"input_values": torch.rand(BATCH, AUDIO)}


def spectrogram() -> Inputs:
    features = torch.rand(BATCH, 16, FRAMES)
    return {"input_features": features, "decoder_input_ids": torch.randint(5, 90, (BATCH, LENGTH))}


def _heads(stem: str, *heads: str) -> tuple[str, ...]:
    return (f"{stem}Model", *(f"{stem}For{head}" for head in heads))


_TOKENS: dict[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = _TOKENS | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "intermediate_size": 40}
_EXPERTS = _DECODER | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": IMAGE,
    "patch_size": 16,
}
_NO_ATTENTIONS = {"has_attentions": False}
_SEQ2SEQ = {"is_encoder_decoder": True}
_COMPOSITE = {"_is_composite": True}

_ENCODERS = (
    Family(
        "bert",
        _ENCODER,
        _heads("Bert", "PreTraining", "MaskedLM", "SequenceClassification", "QuestionAnswering", "TokenClassification"),
        text,
    ),
    Family("roberta", _ENCODER, _heads("Roberta", "MaskedLM", "CausalLM", "SequenceClassification"), text),
    Family(
        "distilbert",
        _TOKENS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37, "max_position_embeddings": 64},
        _heads("DistilBert", "MaskedLM", "SequenceClassification"),
        text,
    ),
    Family(
        "albert",
        _ENCODER | {"embedding_size": 16, "num_hidden_groups": 1},
        _heads("Albert", "MaskedLM", "SequenceClassification"),
        text,
    ),
    Family("electra", _ENCODER | {"embedding_size": 16}, _heads("Electra", "PreTraining", "MaskedLM"), text),
    Family(
        "deberta-v2",
        _ENCODER | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
        _heads("DebertaV2", "MaskedLM", "SequenceClassification"),
        text,
    ),
    Family("modernbert", _ENCODER, _heads("ModernBert", "MaskedLM", "SequenceClassification"), text),
)

_DECODERS = (
    Family(
        "gpt2",
        _TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ("GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification"),
        text,
    ),
    Family("gpt_neox", _ENCODER, _heads("GPTNeoX", "CausalLM", "SequenceClassification"), text),
    Family(
        "opt",
        _TOKENS
        | {
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        _heads("OPT", "CausalLM"),
        text,
    ),
    Family(
        "bloom",
        _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        _heads("Bloom", "CausalLM", "SequenceClassification"),
        text,
    ),
    Family("llama", _DECODER, _heads("Llama", "CausalLM", "SequenceClassification", "TokenClassification"), text),
    Family("mistral", _DECODER, _heads("Mistral", "CausalLM"), text),
    Family("qwen2", _DECODER | {"tie_word_embeddings": True}, _heads("Qwen2", "CausalLM"), text),
    Family("gemma2", _DECODER | {"head_dim": 8}, _heads("Gemma2", "CausalLM"), text),
    Family("phi3", _DECODER, _heads("Phi3", "CausalLM"), text),
    Family(
        "mamba",
        _TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        _heads("Mamba", "CausalLM"),
        lambda: {"input_ids": text()["input_ids"]},
        _NO_ATTENTIONS,
    ),
)

_MIXTURES = (
    Family("mixtral", _DECODER | {"num_local_experts": 4}, _heads("Mixtral", "CausalLM"), text),
    Family(
        "qwen2_moe",
        _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
        _heads("Qwen2Moe", "CausalLM"),
        text,
    ),
    Family("qwen3_moe", _EXPERTS | {"num_experts": 4, "head_dim": 8}, _heads("Qwen3Moe", "CausalLM"), text),
    Family("olmoe", _EXPERTS | {"num_experts": 4}, _heads("Olmoe", "CausalLM"), text),
    Family("gpt_oss", _DECODER | {"num_local_experts": 4, "head_dim": 8}, _heads("GptOss", "CausalLM"), text),
    Family(
        "deepseek_v3",
        _EXPERTS
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        _heads("DeepseekV3", "CausalLM"),
        text,
    ),
)

_PAIRS = (
    Family(
        "t5",
        {"vocab_size": 99, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
        ("T5Model", "T5ForConditionalGeneration", "T5ForSequenceClassification"),
        text_pair,
        _SEQ2SEQ,
    ),
    Family(
        "bart",
        _TOKENS
        | {"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None}
        | {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        | {"encoder_ffn_dim": 37, "decoder_ffn_dim": 37},
        ("BartModel", "BartForConditionalGeneration"),
        text_pair,
        _SEQ2SEQ,
    ),
    Family(
        "whisper",
        _TOKENS
        | {"d_model": 32, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 40}
        | {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        | {"encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "decoder_start_token_id": 3, "suppress_tokens": None}
        | {"begin_suppress_tokens": None},
        ("WhisperModel", "WhisperForConditionalGeneration"),
        spectrogram,
        _SEQ2SEQ,
    ),
)

_TOWERS = (
    Family("vit", _VISION, ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"), image),
    # Its conversions are of the gated MLP; the checks want each of them to be used.
    Family(
        "dinov2",
        _VISION | {"use_swiglu_ffn": True},
        ("Dinov2Model", "Dinov2ForImageClassification", "Dinov2Backbone"),
        image,
    ),
    Family(
        "swin",
        {"image_size": IMAGE, "patch_size": 2, "window_size": 4}
        | {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
        ("SwinModel", "SwinForImageClassification"),
        image,
    ),
    Family(
        "resnet",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        ("ResNetModel", "ResNetForImageClassification", "ResNetBackbone"),
        image,
        _NO_ATTENTIONS,
    ),
    Family(
        "clip",
        {"text_config": _ENCODER, "vision_config": _VISION, "projection_dim": 16},
        ("CLIPModel",),
        image_and_text,
        _COMPOSITE,
    ),
    Family(
        "siglip",
        {"text_config": _ENCODER, "vision_config": _VISION},
        ("SiglipModel",),
        image_and_text,
        _COMPOSITE,
    ),
    Family(
        "wav2vec2",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"intermediate_size": 20, "conv_dim": [16, 16], "conv_stride": [8, 8], "conv_kernel": [8, 8]}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_length": 2},
        _heads("Wav2Vec2", "CTC", "SequenceClassification"),
        waveform,
    ),
)

FAMILIES = (*_ENCODERS, *_DECODERS, *_MIXTURES, *_PAIRS, *_TOWERS)
