"""The table of differences: what tells one family of decoders from another, apart from the fields of its config.

Knows no torch, so that configs can point at their rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["TRAITS", "ExpertNames", "Traits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """What the files of a family call the parts of its experts.

    Attributes:
        block: the part of a layer that holds router and experts; the model calls it ``mlp``.
        gate, up, down: the three projections of one expert.
        always_normalised: the weights of the chosen experts always sum to one, and stay float32. Otherwise the config's
            ``norm_topk_prob`` says, and they are rounded to the type of the model.
        size_field: field of the config that is the inner size of an expert.
    """

    block: str
    gate: str
    up: str
    down: str
    always_normalised: bool
    size_field: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How a family differs from the plainest decoder.

    Attributes:
        attention_bias: "field" where the config's ``attention_bias`` gives all four projections a bias; "inputs" where
            queries, keys and values have one and the output has none.
        mlp_bias: the config's ``mlp_bias`` gives the feed forward block biases.
        qk_norm: queries and keys are normalised, head by head.
        centred_norm: norms multiply by one more than their weight.
        sandwich_norm: attention and feed forward are normalised behind as well as before.
        scaled_embeddings: embeddings are multiplied by the square root of the hidden size.
        query_scalar: scores are divided by the root of the config's ``query_pre_attn_scalar``, not of the head size.
        capped_scores: the config's ``attn_logit_softcapping`` bends attention scores.
        capped_logits: the config's ``final_logit_softcapping`` bends the scores of the vocabulary.
        windows: "none"; "all" where the config's ``sliding_window`` is for all layers; "typed" where ``layer_types``
            says for which.
        activation: field of the config that names the activation function.
        experts: names in the files, of a family with experts.
    """

    attention_bias: Literal["none", "field", "inputs"] = "none"
    mlp_bias: bool = False
    qk_norm: bool = False
    centred_norm: bool = False
    sandwich_norm: bool = False
    scaled_embeddings: bool = False
    query_scalar: bool = False
    capped_scores: bool = False
    capped_logits: bool = False
    windows: Literal["none", "all", "typed"] = "none"
    activation: str = "hidden_act"
    experts: ExpertNames | None = None


_MIXTRAL_EXPERTS = ExpertNames(
    block="block_sparse_moe", gate="w1", up="w3", down="w2", always_normalised=True, size_field="intermediate_size"
)
_QWEN_EXPERTS = ExpertNames(
    block="mlp",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    always_normalised=False,
    size_field="moe_intermediate_size",
)

TRAITS: Mapping[str, Traits] = {
    "llama": Traits(attention_bias="field", mlp_bias=True),
    "mistral": Traits(windows="all"),
    "mixtral": Traits(windows="all", experts=_MIXTRAL_EXPERTS),
    "qwen2": Traits(attention_bias="inputs", windows="typed"),
    "qwen3": Traits(attention_bias="field", qk_norm=True, windows="typed"),
    "qwen3_moe": Traits(attention_bias="field", qk_norm=True, windows="all", experts=_QWEN_EXPERTS),
    "gemma": Traits(attention_bias="field", centred_norm=True, scaled_embeddings=True),
    "gemma2": Traits(
        attention_bias="field",
        centred_norm=True,
        sandwich_norm=True,
        scaled_embeddings=True,
        query_scalar=True,
        capped_scores=True,
        capped_logits=True,
        windows="typed",
        activation="hidden_activation",
    ),
    # Its configs have a cap for attention scores too, which transformers reads and does not apply.
    "gemma3_text": Traits(
        attention_bias="field",
        qk_norm=True,
        centred_norm=True,
        sandwich_norm=True,
        scaled_embeddings=True,
        query_scalar=True,
        capped_logits=True,
        windows="typed",
        activation="hidden_activation",
    ),
}
