"""What decoders return, with transformers' fields."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastload.models.cache import KVCache
from fastload.models.outputs import ModelOutput, Tensors

__all__ = [
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "MoeCausalLMOutputWithPast",
    "MoeModelOutputWithPast",
    "Record",
    "SequenceClassifierOutputWithPast",
]


@dataclass(slots=True)
class Record:
    """What a forward was asked to keep besides its result: a list for each kind, None where it is not wanted."""

    attentions: list[Tensor] | None = None
    router_logits: list[Tensor] | None = None


class BaseModelOutputWithPast(ModelOutput):
    """Of a decoder without a head.

    Attributes:
        last_hidden_state: (batch, tokens, hidden size), normalised.
        past_key_values: the cache to be handed to the next call.
        hidden_states: (batch, tokens, hidden size) of the embeddings and of every layer; the last one is normalised.
        attentions: (batch, heads, tokens, keys) of every layer.
    """

    last_hidden_state: Tensor
    past_key_values: KVCache | None
    hidden_states: Tensors | None
    attentions: Tensors | None


class MoeModelOutputWithPast(BaseModelOutputWithPast):
    """The same of a decoder with experts; router_logits are (batch * tokens, experts) of every layer that has them."""

    router_logits: Tensors | None


class CausalLMOutputWithPast(ModelOutput):
    """Of a decoder that predicts the next token: logits are (batch, tokens, vocabulary)."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KVCache | None
    hidden_states: Tensors | None
    attentions: Tensors | None


class MoeCausalLMOutputWithPast(ModelOutput):
    """The same of one with experts; aux_loss tells how unevenly they are used."""

    loss: Tensor | None
    aux_loss: Tensor | None
    logits: Tensor
    past_key_values: KVCache | None
    hidden_states: Tensors | None
    attentions: Tensors | None
    router_logits: Tensors | None


class SequenceClassifierOutputWithPast(ModelOutput):
    """Of a classifier of texts: logits are (batch, labels)."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KVCache | None
    hidden_states: Tensors | None
    attentions: Tensors | None
