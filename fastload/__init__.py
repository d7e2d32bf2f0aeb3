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
    from fastload.loader import load_model as load_model
    from fastload.loader import load_state_dict as load_state_dict
    from fastload.loader import report as report
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
    from fastload.models.config import PreTrainedConfig as PreTrainedConfig
    from fastload.models.generation.generation_config import GenerationConfig as GenerationConfig
    from fastload.prefetching import Prefetch as Prefetch
    from fastload.prefetching import prefetch as prefetch
    from fastload.reports import LoadReport as LoadReport
    from fastload.saver import SaveReport as SaveReport
    from fastload.saver import save_state_dict as save_state_dict
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
    "GenerationConfig": "fastload.models.generation.generation_config",
    "LoadReport": "fastload.reports",
    "PreTrainedConfig": "fastload.models.config",
    "PreTrainedModel": "fastload.models.base",
    "Prefetch": "fastload.prefetching",
    "SaveReport": "fastload.saver",
    "detach": "fastload.detaching",
    "load_model": "fastload.loader",
    "load_state_dict": "fastload.loader",
    "open_checkpoint": "fastload.checkpoint",
    "prefetch": "fastload.prefetching",
    "report": "fastload.loader",
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
