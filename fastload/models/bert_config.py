"""The config of BERT. Apart from the model, so that it can be read without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fastload.errors import ConfigError
from fastload.models.config import PreTrainedConfig
from fastload.models.fields import Bounds

__all__ = ["BertConfig"]


class BertConfig(PreTrainedConfig):
    """Fields and defaults of ``bert-base-uncased``, as transformers has them."""

    model_type: ClassVar[str] = "bert"
    bounds: ClassVar[Mapping[str, Bounds]] = {
        "vocab_size": Bounds(1, 2**31),
        "hidden_size": Bounds(1, 2**20),
        "num_hidden_layers": Bounds(0, 10_000),
        "num_attention_heads": Bounds(1, 2**20),
        "intermediate_size": Bounds(1, 2**24),
        "max_position_embeddings": Bounds(1, 2**22),
        "type_vocab_size": Bounds(1, 2**22),
        "hidden_dropout_prob": Bounds(0, 1),
        "attention_probs_dropout_prob": Bounds(0, 1),
        "classifier_dropout": Bounds(0, 1),
        "initializer_range": Bounds(0, 1e6),
        "layer_norm_eps": Bounds(0, 1e6),
        "chunk_size_feed_forward": Bounds(0, 2**31),
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_cache: bool = True
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def check_relations(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                "the hidden size does not divide into the attention heads",
                key="hidden_size",
                expected=f"a multiple of num_attention_heads = {self.num_attention_heads}",
                found=self.hidden_size,
                fix="change one of the two",
            )
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ConfigError(
                "the padding token is not in the vocabulary",
                key="pad_token_id",
                expected=f"None, or less than vocab_size = {self.vocab_size}",
                found=self.pad_token_id,
            )
        if self.add_cross_attention and not self.is_decoder:
            raise ConfigError(
                "only a decoder attends to another sequence",
                key="add_cross_attention",
                expected="is_decoder = true beside add_cross_attention = true",
                found="is_decoder = false",
                fix="set is_decoder=True, or add_cross_attention=False",
            )
