"""The layers of decoders such as Llama, Mistral, Qwen and Gemma, and the model without a head.

One set of layers for all families: a config's fields and the table in ``decoder_traits`` tell them apart. The heads are
in ``decoder_heads``, the families' classes in ``decoder_families``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastload.models.base import PreTrainedModel
from fastload.models.cache import GrowingKVCache, KVCache
from fastload.models.decoder_attention import Sight, attend, see
from fastload.models.decoder_config import SLIDING, DecoderConfig, attention_types, has_experts, head_size
from fastload.models.decoder_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast, Record
from fastload.models.experts import MixtureOfExperts, expert_fusions, expert_initialisers, separated
from fastload.models.initialisation import Rules, ones, zeros
from fastload.models.layers import activation
from fastload.models.outputs import ModelOutput
from fastload.models.parallel_plans import decoder_plan
from fastload.models.rope import Angles, RotaryEmbedding, rotate
from fastload.models.skeleton import repeat_block
from fastload.plan.keys import KeyRules

__all__ = ["DecoderLayer", "DecoderModel", "DecoderPreTrainedModel"]


class RMSNorm(nn.Module):
    """Divides by the root of the mean square, in float32, and multiplies by a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        # Rounded to the type of the states before the weight, as these models were trained.
        return self.weight * F.rms_norm(states, self.weight.shape, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class CentredRMSNorm(RMSNorm):
    """The norm of Gemma: the weight is what is added to one, and rounding comes last."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, states: Tensor) -> Tensor:
        weight = 1.0 + self.weight.float()
        return F.rms_norm(states.float(), weight.shape, weight, self.eps).type_as(states)


class ScaledEmbedding(nn.Embedding):
    """Embeddings times a number, which is rounded to their type first."""

    scale: float = 1.0

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded = super().forward(input_ids)
        return embedded * torch.full((), self.scale, dtype=embedded.dtype, device=embedded.device)


def _norm(config: DecoderConfig, size: int) -> RMSNorm:
    kind = CentredRMSNorm if type(config).traits.centred_norm else RMSNorm
    return kind(size, config.rms_norm_eps)


class DecoderAttention(nn.Module):
    """Attention of tokens to themselves and to those before them."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        traits, size = type(config).traits, config.hidden_size
        self.config = config
        self.layer_idx = layer_idx
        self.head_size = head_size(config)
        n_query = config.num_attention_heads * self.head_size
        n_key = (config.num_key_value_heads or config.num_attention_heads) * self.head_size
        by_field = traits.attention_bias == "field" and config.attention_bias
        has_bias = by_field or traits.attention_bias == "inputs"
        self.q_proj = nn.Linear(size, n_query, bias=has_bias)
        self.k_proj = nn.Linear(size, n_key, bias=has_bias)
        self.v_proj = nn.Linear(size, n_key, bias=has_bias)
        self.o_proj = nn.Linear(n_query, size, bias=by_field)
        self.q_norm = _norm(config, self.head_size) if traits.qk_norm else None
        self.k_norm = _norm(config, self.head_size) if traits.qk_norm else None
        self.scale = float(config.query_pre_attn_scalar if traits.query_scalar else self.head_size) ** -0.5
        self.cap: float | None = config.attn_logit_softcapping if traits.capped_scores else None
        self.dropout = config.attention_dropout or 0.0

    def forward(
        self, hidden_states: Tensor, angles: Angles, sight: Sight, cache: KVCache | None, record: Record | None
    ) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        shape = (batch, tokens, -1, self.head_size)
        query, key = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query.transpose(1, 2), angles), rotate(key.transpose(1, 2), angles)
        if cache is not None:
            key, value = cache.update(self.layer_idx, key, value)
        kept = None if record is None else record.attentions
        attended, weights = attend(
            query,
            key,
            value,
            sight,
            scale=self.scale,
            cap=self.cap,
            dropout=self.dropout if self.training else 0.0,
            explicit=kept is not None or self.config.attn_implementation == "eager",
        )
        if kept is not None and weights is not None:
            kept.append(weights)
        projected: Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, tokens, -1))
        return projected


class DecoderMLP(nn.Module):
    """The feed forward block: one projection gates the other."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        traits, size, inner = type(config).traits, config.hidden_size, config.intermediate_size
        has_bias = traits.mlp_bias and config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=has_bias)
        self.up_proj = nn.Linear(size, inner, bias=has_bias)
        self.down_proj = nn.Linear(inner, size, bias=has_bias)
        self.act_fn = activation(getattr(config, traits.activation))

    def forward(self, hidden_states: Tensor, record: Record | None) -> Tensor:
        gated = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        projected: Tensor = self.down_proj(gated)
        return projected


class DecoderLayer(nn.Module):
    """Attention and the feed forward block, each added to what it was given."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attn = DecoderAttention(config, layer_idx)
        self.mlp = MixtureOfExperts(config) if has_experts(config, layer_idx) else DecoderMLP(config)
        self.input_layernorm = _norm(config, size)
        self.post_attention_layernorm = _norm(config, size)
        self.is_sandwich = type(config).traits.sandwich_norm
        if self.is_sandwich:
            self.pre_feedforward_layernorm = _norm(config, size)
            self.post_feedforward_layernorm = _norm(config, size)

    def forward(
        self,
        hidden_states: Tensor,
        angles: Angles,
        sight: Sight,
        cache: KVCache | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            hidden_states: (batch, tokens, hidden size).
            angles: of the positions of these tokens.
            sight: which keys they see.
            cache: what came before them; gets their keys and values.
            record: gets what was asked for besides the result.
        """
        attended = self.self_attn(self.input_layernorm(hidden_states), angles, sight, cache, record)
        if not self.is_sandwich:
            hidden_states = hidden_states + attended
            fed: Tensor = self.mlp(self.post_attention_layernorm(hidden_states), record)
            return hidden_states + fed
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(hidden_states), record)
        result: Tensor = hidden_states + self.post_feedforward_layernorm(fed)
        return result


class DecoderPreTrainedModel(PreTrainedModel):
    """What decoders have in common."""

    config: DecoderConfig
    config_class: ClassVar[type[DecoderConfig]] = DecoderConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]
    _head_counts: ClassVar[dict[str, str]] = {
        "q_proj": "num_attention_heads",
        "k_proj": "num_key_value_heads",
        "v_proj": "num_key_value_heads",
    }
    # Older files hold the frequencies, layer by layer or once.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(^|\.)rotary_emb\.inv_freq$"]
    _initialisers: ClassVar[Rules] = {
        RMSNorm: {"weight": ones},
        CentredRMSNorm: {"weight": zeros},
        **expert_initialisers,
    }

    @classmethod
    def _key_rules(cls) -> KeyRules:
        rules, names = super()._key_rules(), cls.config_class.traits.experts
        if names is None:
            return rules
        return replace(rules, fusions=expert_fusions(names), spellings=((f".{names.block}.", ".mlp."),))

    def _as_in_files(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        names = type(self.config).traits.experts
        return tensors if names is None else separated(tensors, names)

    def _as_asked(self, output: ModelOutput, return_dict: bool | None) -> Any:
        return output if _or_default(return_dict, self.config.return_dict) else output.to_tuple()


class DecoderModel(DecoderPreTrainedModel):
    """A decoder without a head: hidden states of all tokens.

    Attributes:
        layers: the blocks, alike but for what their configs say of each.
        n_key_heads: heads of keys and values in each block; of a model that is split over ranks, those that are here.
        checkpointing: keywords for torch.utils.checkpoint.checkpoint; None to keep activations.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        traits = type(config).traits
        embedding = ScaledEmbedding if traits.scaled_embeddings else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        if isinstance(self.embed_tokens, ScaledEmbedding):
            self.embed_tokens.scale = config.hidden_size**0.5
        self.layers = nn.ModuleList(_layers(config))
        self.norm = _norm(config, config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config)
        self.n_key_heads = config.num_key_value_heads or config.num_attention_heads
        self.attention_types = attention_types(config)
        self.is_causal = not getattr(config, "use_bidirectional_attention", None)
        self.checkpointing: dict[str, Any] | None = None
        self.post_init()

    def _family_tp_plan(self) -> dict[str, str]:
        return decoder_plan(self.config)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        *,
        output_router_logits: bool | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input_ids: (batch, tokens) numbers of tokens; or ``inputs_embeds`` (batch, tokens, hidden size) instead.
                With a cache, the new tokens only.
            attention_mask: (batch, tokens of the cache and new ones), 1 for tokens and 0 for padding; see
                ``decoder_attention.see`` for masks of four dimensions.
            position_ids: (batch or 1, tokens); 0, 1, 2... by default, counted on from the cache.
            past_key_values: the cache: what was computed of the tokens before these. It gets theirs.
            use_cache: make a cache and return it as ``past_key_values``. By default as the config says, and never while
                gradients are recorded.
            output_hidden_states: return the states of all layers.
            output_attentions: return attention weights, which the fused attention kernels do not give.
            return_dict: False for a plain tuple.
            output_router_logits: return what the routers of experts computed.

        Raises:
            ValueError: not one of input_ids and inputs_embeds, a mask of another shape, a cache that is full.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        config = self.config
        states: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = states.shape[1]
        cache = past_key_values
        if self.checkpointing is not None and self.training:
            # Layers that are computed again would hand in their keys again.
            cache = None
        elif cache is None and _or_default(use_cache, config.use_cache and not torch.is_grad_enabled()):
            cache = GrowingKVCache(
                config, len(states), 0, n_heads=self.n_key_heads, dtype=states.dtype, device=states.device
            )
        n_before = 0 if cache is None else cache.length
        if position_ids is None:
            position_ids = torch.arange(n_before, n_before + tokens, device=states.device)[None]
        record = self._record(output_attentions, output_router_logits)
        kept = [states] if _or_default(output_hidden_states, config.output_hidden_states) else None
        angles = self.rotary_emb(position_ids, states.dtype)
        sights = self._sights(attention_mask, tokens, n_before, states.device)
        for layer, kind in zip(self.layers, self.attention_types, strict=False):
            states = self._run(layer, states, angles[kind], sights[kind], cache, record)
            if kept is not None:
                kept.append(states)
        states = self.norm(states)
        if kept is not None:
            kept[-1] = states
        fields: dict[str, Any] = {
            "last_hidden_state": states,
            "past_key_values": cache,
            "hidden_states": kept and tuple(kept),
            "attentions": record and record.attentions and tuple(record.attentions),
        }
        if type(config).traits.experts is None:
            return self._as_asked(BaseModelOutputWithPast(fields), return_dict)
        fields["router_logits"] = record and record.router_logits and tuple(record.router_logits)
        return self._as_asked(MoeModelOutputWithPast(fields), return_dict)

    def _sights(self, mask: Tensor | None, tokens: int, n_before: int, device: torch.device) -> dict[str, Sight]:
        """What is seen, for each type of layer that there is."""
        return {
            kind: see(
                mask,
                tokens=tokens,
                n_before=n_before,
                window=self.config.sliding_window if kind == SLIDING else None,
                is_causal=self.is_causal,
                device=device,
            )
            for kind in self.rotary_emb.layer_types
        }

    def _record(self, attentions: bool | None, router_logits: bool | None) -> Record | None:
        wants_attentions = _or_default(attentions, self.config.output_attentions)
        wants_routers = _or_default(router_logits, getattr(self.config, "output_router_logits", False))
        if not wants_attentions and not wants_routers:
            return None
        return Record([] if wants_attentions else None, [] if wants_routers else None)

    def _run(self, layer: nn.Module, *args: Any) -> Any:
        if self.checkpointing is not None and self.training:
            return checkpoint(layer, *args, **self.checkpointing)
        return layer(*args)


def _layers(config: DecoderConfig) -> list[DecoderLayer]:
    n_layers = config.num_hidden_layers
    if len({has_experts(config, index) for index in range(n_layers)}) > 1:
        # Two kinds of layers in turn: none is another's copy.
        return [DecoderLayer(config, index) for index in range(n_layers)]
    return repeat_block(lambda index: DecoderLayer(config, index), n_layers)


def _or_default(asked: bool | None, default: bool | None) -> bool:
    return bool(default if asked is None else asked)
