"""How the native families are split over ranks: their tensor parallel plans (see ``plan.tensor_parallel``).

Every block is cut as in Megatron-LM (https://arxiv.org/abs/1909.08053, section 3): its first layers by outputs and its
last by inputs, so that it needs one sum over the ranks. Experts stay whole, and each is on one rank.
"""

from __future__ import annotations

from fastload.models.bert_config import BertConfig
from fastload.models.decoder_config import DecoderConfig, has_experts

__all__ = ["bert_plan", "decoder_plan"]

_ATTENTION = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
# The weights are shared by all heads, of which a rank sees its own.
_HEAD_NORMS = {
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
}
_FEED_FORWARD = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# Every rank asks the whole router.
_EXPERTS = {"layers.*.mlp.experts": "experts"}

# The embeddings of tokens are tied to a head whose bias has two names: they stay whole.
_BERT = {
    f"encoder.layer.*.{name}": style
    for name, style in {
        "attention.self.query": "colwise",
        "attention.self.key": "colwise",
        "attention.self.value": "colwise",
        "attention.output.dense": "rowwise",
        "intermediate.dense": "colwise",
        "output.dense": "rowwise",
    }.items()
}
_BERT_CROSS_ATTENTION = {
    pattern.replace(".attention.", ".crossattention."): style
    for pattern, style in _BERT.items()
    if ".attention." in pattern
}


def bert_plan(config: BertConfig) -> dict[str, str]:
    """The plan of a BERT without a head."""
    if not config.num_hidden_layers:
        return {}
    return {**_BERT, **(_BERT_CROSS_ATTENTION if config.add_cross_attention else {})}


def decoder_plan(config: DecoderConfig) -> dict[str, str]:
    """The plan of a decoder without a head.

    The embeddings of tokens are cut as a head is, by rows, so that the two can be tied.
    """
    plan = {"embed_tokens": "embedding_rowwise"}
    kinds = {has_experts(config, index) for index in range(config.num_hidden_layers)}
    if kinds:
        plan |= _ATTENTION
        if type(config).traits.qk_norm:
            plan |= _HEAD_NORMS
    if False in kinds:
        plan |= _FEED_FORWARD
    if True in kinds:
        plan |= _EXPERTS
    return plan
