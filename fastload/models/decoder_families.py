"""The families' classes, under transformers' names. All is in their bases, their configs and ``decoder_traits``."""

from __future__ import annotations

from fastload.models.decoder import DecoderModel
from fastload.models.decoder_config import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from fastload.models.decoder_heads import (
    DecoderForCausalLM,
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)

__all__ = [
    "Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification",
    "Gemma2ForTokenClassification",
    "Gemma2Model",
    "Gemma3ForCausalLM",
    "Gemma3TextForSequenceClassification",
    "Gemma3TextModel",
    "GemmaForCausalLM",
    "GemmaForSequenceClassification",
    "GemmaForTokenClassification",
    "GemmaModel",
    "LlamaForCausalLM",
    "LlamaForQuestionAnswering",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaModel",
    "MistralForCausalLM",
    "MistralForQuestionAnswering",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralModel",
    "MixtralForCausalLM",
    "MixtralForQuestionAnswering",
    "MixtralForSequenceClassification",
    "MixtralForTokenClassification",
    "MixtralModel",
    "Qwen2ForCausalLM",
    "Qwen2ForQuestionAnswering",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2Model",
    "Qwen3ForCausalLM",
    "Qwen3ForQuestionAnswering",
    "Qwen3ForSequenceClassification",
    "Qwen3ForTokenClassification",
    "Qwen3Model",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeForQuestionAnswering",
    "Qwen3MoeForSequenceClassification",
    "Qwen3MoeForTokenClassification",
    "Qwen3MoeModel",
]


class LlamaModel(DecoderModel):
    config_class = LlamaConfig


class LlamaForCausalLM(DecoderForCausalLM):
    config_class = LlamaConfig
    base_class = LlamaModel


class LlamaForSequenceClassification(DecoderForSequenceClassification):
    config_class = LlamaConfig
    base_class = LlamaModel


class LlamaForQuestionAnswering(DecoderForQuestionAnswering):
    config_class = LlamaConfig
    base_class = LlamaModel
    base_model_prefix = "transformer"


class LlamaForTokenClassification(DecoderForTokenClassification):
    config_class = LlamaConfig
    base_class = LlamaModel


class MistralModel(DecoderModel):
    config_class = MistralConfig


class MistralForCausalLM(DecoderForCausalLM):
    config_class = MistralConfig
    base_class = MistralModel


class MistralForSequenceClassification(DecoderForSequenceClassification):
    config_class = MistralConfig
    base_class = MistralModel


class MistralForQuestionAnswering(DecoderForQuestionAnswering):
    config_class = MistralConfig
    base_class = MistralModel


class MistralForTokenClassification(DecoderForTokenClassification):
    config_class = MistralConfig
    base_class = MistralModel


class MixtralModel(DecoderModel):
    config_class = MixtralConfig


class MixtralForCausalLM(DecoderForCausalLM):
    config_class = MixtralConfig
    base_class = MixtralModel


class MixtralForSequenceClassification(DecoderForSequenceClassification):
    config_class = MixtralConfig
    base_class = MixtralModel


class MixtralForQuestionAnswering(DecoderForQuestionAnswering):
    config_class = MixtralConfig
    base_class = MixtralModel


class MixtralForTokenClassification(DecoderForTokenClassification):
    config_class = MixtralConfig
    base_class = MixtralModel


class Qwen2Model(DecoderModel):
    config_class = Qwen2Config


class Qwen2ForCausalLM(DecoderForCausalLM):
    config_class = Qwen2Config
    base_class = Qwen2Model


class Qwen2ForSequenceClassification(DecoderForSequenceClassification):
    config_class = Qwen2Config
    base_class = Qwen2Model


class Qwen2ForQuestionAnswering(DecoderForQuestionAnswering):
    config_class = Qwen2Config
    base_class = Qwen2Model
    base_model_prefix = "transformer"


class Qwen2ForTokenClassification(DecoderForTokenClassification):
    config_class = Qwen2Config
    base_class = Qwen2Model


class Qwen3Model(DecoderModel):
    config_class = Qwen3Config


class Qwen3ForCausalLM(DecoderForCausalLM):
    config_class = Qwen3Config
    base_class = Qwen3Model


class Qwen3ForSequenceClassification(DecoderForSequenceClassification):
    config_class = Qwen3Config
    base_class = Qwen3Model


class Qwen3ForQuestionAnswering(DecoderForQuestionAnswering):
    config_class = Qwen3Config
    base_class = Qwen3Model
    base_model_prefix = "transformer"


class Qwen3ForTokenClassification(DecoderForTokenClassification):
    config_class = Qwen3Config
    base_class = Qwen3Model


class Qwen3MoeModel(DecoderModel):
    config_class = Qwen3MoeConfig


class Qwen3MoeForCausalLM(DecoderForCausalLM):
    config_class = Qwen3MoeConfig
    base_class = Qwen3MoeModel


class Qwen3MoeForSequenceClassification(DecoderForSequenceClassification):
    config_class = Qwen3MoeConfig
    base_class = Qwen3MoeModel


class Qwen3MoeForQuestionAnswering(DecoderForQuestionAnswering):
    config_class = Qwen3MoeConfig
    base_class = Qwen3MoeModel
    base_model_prefix = "transformer"


class Qwen3MoeForTokenClassification(DecoderForTokenClassification):
    config_class = Qwen3MoeConfig
    base_class = Qwen3MoeModel


class GemmaModel(DecoderModel):
    config_class = GemmaConfig


class GemmaForCausalLM(DecoderForCausalLM):
    config_class = GemmaConfig
    base_class = GemmaModel


class GemmaForSequenceClassification(DecoderForSequenceClassification):
    config_class = GemmaConfig
    base_class = GemmaModel


class GemmaForTokenClassification(DecoderForTokenClassification):
    config_class = GemmaConfig
    base_class = GemmaModel


class Gemma2Model(DecoderModel):
    config_class = Gemma2Config


class Gemma2ForCausalLM(DecoderForCausalLM):
    config_class = Gemma2Config
    base_class = Gemma2Model


class Gemma2ForSequenceClassification(DecoderForSequenceClassification):
    config_class = Gemma2Config
    base_class = Gemma2Model


class Gemma2ForTokenClassification(DecoderForTokenClassification):
    config_class = Gemma2Config
    base_class = Gemma2Model


class Gemma3TextModel(DecoderModel):
    config_class = Gemma3TextConfig


class Gemma3ForCausalLM(DecoderForCausalLM):
    config_class = Gemma3TextConfig
    base_class = Gemma3TextModel


class Gemma3TextForSequenceClassification(DecoderForSequenceClassification):
    config_class = Gemma3TextConfig
    base_class = Gemma3TextModel
