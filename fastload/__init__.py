"""fastload: load any Hugging Face checkpoint into PyTorch at the speed the hardware allows, and save it back.

Importing this package costs next to nothing: every name below is fetched from its room when it is first used, and
torch is imported only then.
"""

from __future__ import annotations

# Importing typing would take longer than all else here; type checkers take any constant of this name for true.
TYPE_CHECKING = False

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastload.checkpoint import Checkpoint as Checkpoint
    from fastload.checkpoint import open_checkpoint as open_checkpoint
    from fastload.detaching import detach as detach
    from fastload.errors import FastloadError as FastloadError
    from fastload.files import load_file as load_file
    from fastload.files import safe_open as safe_open
    from fastload.files import save_file as save_file
    from fastload.filling import report as report
    from fastload.loader import load_model as load_model
    from fastload.loader import load_state_dict as load_state_dict
    from fastload.models.auto import AutoConfig as AutoConfig
    from fastload.models.auto import AutoModel as AutoModel
    from fastload.models.auto import AutoModelForCausalLM as AutoModelForCausalLM
    from fastload.models.auto import AutoModelForMaskedLM as AutoModelForMaskedLM
    from fastload.models.auto import AutoModelForMultipleChoice as AutoModelForMultipleChoice
    from fastload.models.auto import AutoModelForNextSentencePrediction as AutoModelForNextSentencePrediction
    from fastload.models.auto import AutoModelForPreTraining as AutoModelForPreTraining
    from fastload.models.auto import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
    from fastload.models.auto import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from fastload.models.auto import AutoModelForTokenClassification as AutoModelForTokenClassification
    from fastload.models.base import PreTrainedModel as PreTrainedModel
    from fastload.models.bert import BertModel as BertModel
    from fastload.models.bert_config import BertConfig as BertConfig
    from fastload.models.bert_heads import BertForMaskedLM as BertForMaskedLM
    from fastload.models.bert_heads import BertForMultipleChoice as BertForMultipleChoice
    from fastload.models.bert_heads import BertForNextSentencePrediction as BertForNextSentencePrediction
    from fastload.models.bert_heads import BertForPreTraining as BertForPreTraining
    from fastload.models.bert_heads import BertForQuestionAnswering as BertForQuestionAnswering
    from fastload.models.bert_heads import BertForSequenceClassification as BertForSequenceClassification
    from fastload.models.bert_heads import BertForTokenClassification as BertForTokenClassification
    from fastload.models.bert_heads import BertLMHeadModel as BertLMHeadModel
    from fastload.models.cache import KVCache as KVCache
    from fastload.models.config import PreTrainedConfig as PreTrainedConfig
    from fastload.models.decoder_config import Gemma2Config as Gemma2Config
    from fastload.models.decoder_config import Gemma3TextConfig as Gemma3TextConfig
    from fastload.models.decoder_config import GemmaConfig as GemmaConfig
    from fastload.models.decoder_config import LlamaConfig as LlamaConfig
    from fastload.models.decoder_config import MistralConfig as MistralConfig
    from fastload.models.decoder_config import MixtralConfig as MixtralConfig
    from fastload.models.decoder_config import Qwen2Config as Qwen2Config
    from fastload.models.decoder_config import Qwen3Config as Qwen3Config
    from fastload.models.decoder_config import Qwen3MoeConfig as Qwen3MoeConfig
    from fastload.models.decoder_families import Gemma2ForCausalLM as Gemma2ForCausalLM
    from fastload.models.decoder_families import Gemma2ForSequenceClassification as Gemma2ForSequenceClassification
    from fastload.models.decoder_families import Gemma2ForTokenClassification as Gemma2ForTokenClassification
    from fastload.models.decoder_families import Gemma2Model as Gemma2Model
    from fastload.models.decoder_families import Gemma3ForCausalLM as Gemma3ForCausalLM
    from fastload.models.decoder_families import (
        Gemma3TextForSequenceClassification as Gemma3TextForSequenceClassification,
    )
    from fastload.models.decoder_families import Gemma3TextModel as Gemma3TextModel
    from fastload.models.decoder_families import GemmaForCausalLM as GemmaForCausalLM
    from fastload.models.decoder_families import GemmaForSequenceClassification as GemmaForSequenceClassification
    from fastload.models.decoder_families import GemmaForTokenClassification as GemmaForTokenClassification
    from fastload.models.decoder_families import GemmaModel as GemmaModel
    from fastload.models.decoder_families import LlamaForCausalLM as LlamaForCausalLM
    from fastload.models.decoder_families import LlamaForQuestionAnswering as LlamaForQuestionAnswering
    from fastload.models.decoder_families import LlamaForSequenceClassification as LlamaForSequenceClassification
    from fastload.models.decoder_families import LlamaForTokenClassification as LlamaForTokenClassification
    from fastload.models.decoder_families import LlamaModel as LlamaModel
    from fastload.models.decoder_families import MistralForCausalLM as MistralForCausalLM
    from fastload.models.decoder_families import MistralForQuestionAnswering as MistralForQuestionAnswering
    from fastload.models.decoder_families import MistralForSequenceClassification as MistralForSequenceClassification
    from fastload.models.decoder_families import MistralForTokenClassification as MistralForTokenClassification
    from fastload.models.decoder_families import MistralModel as MistralModel
    from fastload.models.decoder_families import MixtralForCausalLM as MixtralForCausalLM
    from fastload.models.decoder_families import MixtralForQuestionAnswering as MixtralForQuestionAnswering
    from fastload.models.decoder_families import MixtralForSequenceClassification as MixtralForSequenceClassification
    from fastload.models.decoder_families import MixtralForTokenClassification as MixtralForTokenClassification
    from fastload.models.decoder_families import MixtralModel as MixtralModel
    from fastload.models.decoder_families import Qwen2ForCausalLM as Qwen2ForCausalLM
    from fastload.models.decoder_families import Qwen2ForQuestionAnswering as Qwen2ForQuestionAnswering
    from fastload.models.decoder_families import Qwen2ForSequenceClassification as Qwen2ForSequenceClassification
    from fastload.models.decoder_families import Qwen2ForTokenClassification as Qwen2ForTokenClassification
    from fastload.models.decoder_families import Qwen2Model as Qwen2Model
    from fastload.models.decoder_families import Qwen3ForCausalLM as Qwen3ForCausalLM
    from fastload.models.decoder_families import Qwen3ForQuestionAnswering as Qwen3ForQuestionAnswering
    from fastload.models.decoder_families import Qwen3ForSequenceClassification as Qwen3ForSequenceClassification
    from fastload.models.decoder_families import Qwen3ForTokenClassification as Qwen3ForTokenClassification
    from fastload.models.decoder_families import Qwen3Model as Qwen3Model
    from fastload.models.decoder_families import Qwen3MoeForCausalLM as Qwen3MoeForCausalLM
    from fastload.models.decoder_families import Qwen3MoeForQuestionAnswering as Qwen3MoeForQuestionAnswering
    from fastload.models.decoder_families import Qwen3MoeForSequenceClassification as Qwen3MoeForSequenceClassification
    from fastload.models.decoder_families import Qwen3MoeForTokenClassification as Qwen3MoeForTokenClassification
    from fastload.models.decoder_families import Qwen3MoeModel as Qwen3MoeModel
    from fastload.models.generation.generation_config import GenerationConfig as GenerationConfig
    from fastload.prefetching import Prefetch as Prefetch
    from fastload.prefetching import prefetch as prefetch
    from fastload.reports import LoadReport as LoadReport
    from fastload.saver import SaveReport as SaveReport
    from fastload.saver import save_state_dict as save_state_dict
    from fastload.saving import save_model as save_model
    from fastload.storage.ring import free_pinned_memory as free_pinned_memory
    from fastload.streaming.arrivals import wait as wait

# Where each public name lives.
_HOMES = {
    "AutoConfig": "fastload.models.auto",
    "AutoModel": "fastload.models.auto",
    "AutoModelForCausalLM": "fastload.models.auto",
    "AutoModelForMaskedLM": "fastload.models.auto",
    "AutoModelForMultipleChoice": "fastload.models.auto",
    "AutoModelForNextSentencePrediction": "fastload.models.auto",
    "AutoModelForPreTraining": "fastload.models.auto",
    "AutoModelForQuestionAnswering": "fastload.models.auto",
    "AutoModelForSequenceClassification": "fastload.models.auto",
    "AutoModelForTokenClassification": "fastload.models.auto",
    "BertConfig": "fastload.models.bert_config",
    "BertForMaskedLM": "fastload.models.bert_heads",
    "BertForMultipleChoice": "fastload.models.bert_heads",
    "BertForNextSentencePrediction": "fastload.models.bert_heads",
    "BertForPreTraining": "fastload.models.bert_heads",
    "BertForQuestionAnswering": "fastload.models.bert_heads",
    "BertForSequenceClassification": "fastload.models.bert_heads",
    "BertForTokenClassification": "fastload.models.bert_heads",
    "BertLMHeadModel": "fastload.models.bert_heads",
    "BertModel": "fastload.models.bert",
    "Checkpoint": "fastload.checkpoint",
    "FastloadError": "fastload.errors",
    "Gemma2Config": "fastload.models.decoder_config",
    "Gemma2ForCausalLM": "fastload.models.decoder_families",
    "Gemma2ForSequenceClassification": "fastload.models.decoder_families",
    "Gemma2ForTokenClassification": "fastload.models.decoder_families",
    "Gemma2Model": "fastload.models.decoder_families",
    "Gemma3ForCausalLM": "fastload.models.decoder_families",
    "Gemma3TextConfig": "fastload.models.decoder_config",
    "Gemma3TextForSequenceClassification": "fastload.models.decoder_families",
    "Gemma3TextModel": "fastload.models.decoder_families",
    "GemmaConfig": "fastload.models.decoder_config",
    "GemmaForCausalLM": "fastload.models.decoder_families",
    "GemmaForSequenceClassification": "fastload.models.decoder_families",
    "GemmaForTokenClassification": "fastload.models.decoder_families",
    "GemmaModel": "fastload.models.decoder_families",
    "GenerationConfig": "fastload.models.generation.generation_config",
    "KVCache": "fastload.models.cache",
    "LlamaConfig": "fastload.models.decoder_config",
    "LlamaForCausalLM": "fastload.models.decoder_families",
    "LlamaForQuestionAnswering": "fastload.models.decoder_families",
    "LlamaForSequenceClassification": "fastload.models.decoder_families",
    "LlamaForTokenClassification": "fastload.models.decoder_families",
    "LlamaModel": "fastload.models.decoder_families",
    "LoadReport": "fastload.reports",
    "MistralConfig": "fastload.models.decoder_config",
    "MistralForCausalLM": "fastload.models.decoder_families",
    "MistralForQuestionAnswering": "fastload.models.decoder_families",
    "MistralForSequenceClassification": "fastload.models.decoder_families",
    "MistralForTokenClassification": "fastload.models.decoder_families",
    "MistralModel": "fastload.models.decoder_families",
    "MixtralConfig": "fastload.models.decoder_config",
    "MixtralForCausalLM": "fastload.models.decoder_families",
    "MixtralForQuestionAnswering": "fastload.models.decoder_families",
    "MixtralForSequenceClassification": "fastload.models.decoder_families",
    "MixtralForTokenClassification": "fastload.models.decoder_families",
    "MixtralModel": "fastload.models.decoder_families",
    "PreTrainedConfig": "fastload.models.config",
    "PreTrainedModel": "fastload.models.base",
    "Prefetch": "fastload.prefetching",
    "Qwen2Config": "fastload.models.decoder_config",
    "Qwen2ForCausalLM": "fastload.models.decoder_families",
    "Qwen2ForQuestionAnswering": "fastload.models.decoder_families",
    "Qwen2ForSequenceClassification": "fastload.models.decoder_families",
    "Qwen2ForTokenClassification": "fastload.models.decoder_families",
    "Qwen2Model": "fastload.models.decoder_families",
    "Qwen3Config": "fastload.models.decoder_config",
    "Qwen3ForCausalLM": "fastload.models.decoder_families",
    "Qwen3ForQuestionAnswering": "fastload.models.decoder_families",
    "Qwen3ForSequenceClassification": "fastload.models.decoder_families",
    "Qwen3ForTokenClassification": "fastload.models.decoder_families",
    "Qwen3Model": "fastload.models.decoder_families",
    "Qwen3MoeConfig": "fastload.models.decoder_config",
    "Qwen3MoeForCausalLM": "fastload.models.decoder_families",
    "Qwen3MoeForQuestionAnswering": "fastload.models.decoder_families",
    "Qwen3MoeForSequenceClassification": "fastload.models.decoder_families",
    "Qwen3MoeForTokenClassification": "fastload.models.decoder_families",
    "Qwen3MoeModel": "fastload.models.decoder_families",
    "SaveReport": "fastload.saver",
    "detach": "fastload.detaching",
    "free_pinned_memory": "fastload.storage.ring",
    "load_file": "fastload.files",
    "load_model": "fastload.loader",
    "load_state_dict": "fastload.loader",
    "open_checkpoint": "fastload.checkpoint",
    "prefetch": "fastload.prefetching",
    "report": "fastload.filling",
    "safe_open": "fastload.files",
    "save_file": "fastload.files",
    "save_model": "fastload.saving",
    "save_state_dict": "fastload.saver",
    "wait": "fastload.streaming.arrivals",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None and name.startswith("AutoModelFor"):
        # A task that no native family has: transformers' class, loaded by fastload.
        home = "fastload.hf"
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
