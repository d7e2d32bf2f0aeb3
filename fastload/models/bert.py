"""BERT (Devlin et al., https://arxiv.org/abs/1810.04805), with the names and the arguments that transformers gives it.

The layers and the model without a head; the heads are in ``bert_heads``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastload.models.base import PreTrainedModel
from fastload.models.bert_config import BertConfig
from fastload.models.layers import AttentionMask, activation, attend, expand_mask, real_device
from fastload.models.outputs import BaseModelOutputWithPoolingAndCrossAttentions, KeyValues, ModelOutput, Tensors
from fastload.models.parallel_plans import bert_plan
from fastload.models.skeleton import repeat_block

__all__ = ["BertConfig", "BertLayer", "BertModel", "BertPreTrainedModel"]


class BertEmbeddings(nn.Module):
    """Token, position and segment embeddings, summed and normalised."""

    position_ids: Tensor
    token_type_ids: Tensor

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        # No checkpoint holds these, so they are made whole even while the model is built on meta.
        device = real_device()
        positions = torch.arange(config.max_position_embeddings, device=device).expand((1, -1))
        self.register_buffer("position_ids", positions, persistent=False)
        segments = torch.zeros(positions.shape, dtype=torch.long, device=device)
        self.register_buffer("token_type_ids", segments, persistent=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        embedded: Tensor = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        begin, end = past_key_values_length, past_key_values_length + embedded.shape[1]
        if position_ids is None:
            if end > self.position_ids.shape[1]:
                raise ValueError(f"{end} tokens, where the model has {self.position_ids.shape[1]} positions")
            position_ids = self.position_ids[:, begin:end]
        if token_type_ids is None:
            # One row of zeros; the sum repeats it for the batch.
            token_type_ids = self.token_type_ids[:, : embedded.shape[1]]
        embedded = embedded + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        normalised: Tensor = self.dropout(self.LayerNorm(embedded))
        return normalised


class BertSelfAttention(nn.Module):
    """Attention of a sequence to itself, or to another one (``encoder_hidden_states``)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_size = size // config.num_attention_heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def _heads(self, projected: Tensor) -> Tensor:
        """(batch, tokens, hidden size) -> (batch, heads, tokens, head size), a view."""
        batch, tokens, _ = projected.shape
        return projected.view(batch, tokens, -1, self.head_size).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask,
        past: Tensors | None = None,
        encoder_hidden_states: Tensor | None = None,
        explicit: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensors]:
        """The attended values, the weights where ``explicit``, and the key and value to be cached."""
        query = self._heads(self.query(hidden_states))
        if encoder_hidden_states is not None and past is not None:
            # The other sequence stays as it was, and so do its projections.
            key, value = past
        else:
            attended_to = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key, value = self._heads(self.key(attended_to)), self._heads(self.value(attended_to))
            if past is not None:
                key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        dropout = self.dropout.p if self.training else 0.0
        context, weights = attend(query, key, value, mask, dropout=dropout, explicit=explicit)
        return context.transpose(1, 2).flatten(2), weights, (key, value)


class BertSelfOutput(nn.Module):
    """Projection, dropout, residual, norm: the end of every block."""

    def __init__(self, config: BertConfig, n_inputs: int | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(n_inputs or config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        normalised: Tensor = self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)
        return normalised


class BertOutput(BertSelfOutput):
    """The end of the feed forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.intermediate_size)


class BertAttention(nn.Module):
    """Attention and its residual."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensors]:
        context, weights, cached = self.self(hidden_states, *args, **kwargs)
        return self.output(context, hidden_states), weights, cached


class BertIntermediate(nn.Module):
    """The wide half of the feed forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class BertLayer(nn.Module):
    """Self attention, cross attention in a decoder that has it, and the feed forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.is_decoder = config.is_decoder
        self.attention = BertAttention(config)
        self.crossattention = BertAttention(config) if config.add_cross_attention else None
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask,
        encoder_hidden_states: Tensor | None = None,
        encoder_mask: AttentionMask | None = None,
        past: Tensors | None = None,
        explicit: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensors]:
        """The hidden states, the weights of both attentions where ``explicit``, and what is cached of the layer."""
        states, weights, cached = self.attention(
            hidden_states, mask, None if past is None else past[:2], explicit=explicit
        )
        cross_weights = None
        if self.is_decoder and encoder_hidden_states is not None:
            if self.crossattention is None:
                raise ValueError("encoder_hidden_states need a config with add_cross_attention=True")
            cross_past = past[2:4] if past is not None and len(past) == 4 else None
            states, cross_weights, cross_cached = self.crossattention(
                states, encoder_mask or AttentionMask(), cross_past, encoder_hidden_states, explicit
            )
            cached += cross_cached
        if self.chunk_size:
            # Fewer tokens at a time through the wide middle: less memory, the same numbers.
            chunks = [self._feed_forward(chunk) for chunk in states.split(self.chunk_size, dim=1)]
            return torch.cat(chunks, dim=1), weights, cross_weights, cached
        return self._feed_forward(states), weights, cross_weights, cached

    def _feed_forward(self, states: Tensor) -> Tensor:
        fed: Tensor = self.output(self.intermediate(states), states)
        return fed


class BertEncoder(nn.Module):
    """The stack of layers.

    Attributes:
        checkpointing: keywords for torch.utils.checkpoint.checkpoint; None to keep activations.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(repeat_block(lambda _: BertLayer(config), config.num_hidden_layers))
        self.checkpointing: dict[str, Any] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask,
        encoder_hidden_states: Tensor | None,
        encoder_mask: AttentionMask | None,
        past_key_values: KeyValues | None,
        *,
        use_cache: bool,
        explicit: bool,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        states = [hidden_states]
        attentions, cross_attentions, caches = [], [], []
        for index, layer in enumerate(self.layer):
            past = None if past_key_values is None else past_key_values[index]
            hidden_states, weights, cross_weights, cached = self._run(
                layer, hidden_states, mask, encoder_hidden_states, encoder_mask, past, explicit
            )
            # Kept only where it is asked for: a reference would keep the memory.
            if output_hidden_states:
                states.append(hidden_states)
            if output_attentions:
                attentions.append(weights)
                cross_attentions += [] if cross_weights is None else [cross_weights]
            if use_cache:
                caches.append(cached)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
            past_key_values=tuple(caches) if use_cache else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
        )

    def _run(self, layer: nn.Module, *args: Any) -> Any:
        if self.checkpointing is not None and self.training:
            return checkpoint(layer, *args, **self.checkpointing)
        return layer(*args)


class BertPooler(nn.Module):
    """A vector of the sequence, made from that of its first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        pooled: Tensor = self.activation(self.dense(hidden_states[:, 0]))
        return pooled


class BertPreTrainedModel(PreTrainedModel):
    """What BERT models have in common."""

    config: BertConfig
    config_class = BertConfig
    base_model_prefix = "bert"
    _no_split_modules: ClassVar[list[str]] = ["BertEmbeddings", "BertLayer"]
    _head_counts: ClassVar[dict[str, str]] = dict.fromkeys(("query", "key", "value"), "num_attention_heads")
    # transformers 4 saved the numbers 0, 1, 2... with the weights.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(^|\.)embeddings\.(position_ids|token_type_ids)$"]

    def _as_asked(self, output: ModelOutput, return_dict: bool | None) -> Any:
        return output if _or_default(return_dict, self.config.return_dict) else output.to_tuple()


class BertModel(BertPreTrainedModel):
    """BERT without a head: hidden states of all tokens, and a pooled vector of the sequence."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def _family_tp_plan(self) -> dict[str, str]:
        return bert_plan(self.config)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: KeyValues | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input_ids: (batch, tokens) numbers of tokens; or ``inputs_embeds`` (batch, tokens, hidden size) instead.
            attention_mask: 1 for tokens, 0 for padding; see ``layers.expand_mask`` for the shapes.
            token_type_ids: (batch, tokens) 0 for the first sentence, 1 for the second; all 0 by default.
            position_ids: (batch, tokens); 0, 1, 2... by default, counted on from the cache.
            encoder_hidden_states, encoder_attention_mask: (batch, other tokens, hidden size) that a decoder with
                cross attention attends to, and its mask.
            past_key_values: what an earlier call of a decoder returned under this name.
            use_cache: return ``past_key_values``; the config's by default, False for an encoder.
            output_attentions: return attention weights, which the fused attention kernel does not give.
            output_hidden_states: return the states of all layers.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: not one of input_ids and inputs_embeds, a mask of another shape, too many tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        config = self.config
        output_attentions = _or_default(output_attentions, config.output_attentions)
        use_cache = config.is_decoder and _or_default(use_cache, config.use_cache)
        if self.encoder.checkpointing is not None and self.training:
            # A cache would keep the activations that checkpointing means to drop.
            use_cache = False
        n_before = past_key_values[0][0].shape[2] if past_key_values else 0
        embedded = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, n_before)
        tokens, device = embedded.shape[1], embedded.device
        mask = expand_mask(attention_mask, tokens=tokens, n_before=n_before, causal=config.is_decoder, device=device)
        encoder_mask = None
        if encoder_hidden_states is not None:
            n_keys = encoder_hidden_states.shape[1]
            encoder_mask = expand_mask(
                encoder_attention_mask, tokens=tokens, n_keys=n_keys, causal=False, device=device
            )
        output = self.encoder(
            embedded,
            mask,
            encoder_hidden_states,
            encoder_mask,
            past_key_values or None,
            use_cache=use_cache,
            explicit=output_attentions or config.attn_implementation == "eager",
            output_attentions=output_attentions,
            output_hidden_states=_or_default(output_hidden_states, config.output_hidden_states),
        )
        if self.pooler is not None:
            output.pooler_output = self.pooler(output.last_hidden_state)
        return self._as_asked(output, return_dict)


def _or_default(asked: bool | None, default: bool | None) -> bool:
    return bool(default if asked is None else asked)
