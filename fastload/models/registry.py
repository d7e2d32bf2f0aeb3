"""Which classes make up a family of models. A new family is its modules and one row here.

The rows name classes by strings, so that looking a family up imports no other one.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastload.errors import ConfigError, OptionError

__all__ = ["Family", "class_for", "config_class_for", "family_of", "is_native", "native_families", "register"]

# "module:Name", imported when needed, or a class that a user has registered.
Reference = str | type[Any]


@dataclass(frozen=True, slots=True)
class Family:
    """A model type: its config class, and the model class for each Auto class, by the Auto class's name."""

    config: Reference
    tasks: Mapping[str, Reference] = field(default_factory=dict)


_BERT = "fastload.models.bert_heads:"


def _decoder(config: str, base: str, *heads: str) -> Family:
    """A row of decoders: their config, their model without a head, and those with one, named after their Auto class."""
    tasks = {f"AutoModelFor{head.rpartition('For')[2]}": head for head in heads}
    classes = {task: f"fastload.models.decoder_families:{name}" for task, name in {"AutoModel": base, **tasks}.items()}
    return Family(f"fastload.models.decoder_config:{config}", classes)


_FAMILIES: dict[str, Family] = {
    "bert": Family(
        "fastload.models.bert_config:BertConfig",
        {
            "AutoModel": "fastload.models.bert:BertModel",
            "AutoModelForCausalLM": _BERT + "BertLMHeadModel",
            "AutoModelForMaskedLM": _BERT + "BertForMaskedLM",
            "AutoModelForMultipleChoice": _BERT + "BertForMultipleChoice",
            "AutoModelForNextSentencePrediction": _BERT + "BertForNextSentencePrediction",
            "AutoModelForPreTraining": _BERT + "BertForPreTraining",
            "AutoModelForQuestionAnswering": _BERT + "BertForQuestionAnswering",
            "AutoModelForSequenceClassification": _BERT + "BertForSequenceClassification",
            "AutoModelForTokenClassification": _BERT + "BertForTokenClassification",
        },
    ),
    "gemma": _decoder(
        "GemmaConfig",
        "GemmaModel",
        "GemmaForCausalLM",
        "GemmaForSequenceClassification",
        "GemmaForTokenClassification",
    ),
    "gemma2": _decoder(
        "Gemma2Config",
        "Gemma2Model",
        "Gemma2ForCausalLM",
        "Gemma2ForSequenceClassification",
        "Gemma2ForTokenClassification",
    ),
    "gemma3_text": _decoder(
        "Gemma3TextConfig",
        "Gemma3TextModel",
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
    ),
    "llama": _decoder(
        "LlamaConfig",
        "LlamaModel",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        "LlamaForQuestionAnswering",
        "LlamaForTokenClassification",
    ),
    "mistral": _decoder(
        "MistralConfig",
        "MistralModel",
        "MistralForCausalLM",
        "MistralForSequenceClassification",
        "MistralForQuestionAnswering",
        "MistralForTokenClassification",
    ),
    "mixtral": _decoder(
        "MixtralConfig",
        "MixtralModel",
        "MixtralForCausalLM",
        "MixtralForSequenceClassification",
        "MixtralForQuestionAnswering",
        "MixtralForTokenClassification",
    ),
    "qwen2": _decoder(
        "Qwen2Config",
        "Qwen2Model",
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        "Qwen2ForQuestionAnswering",
        "Qwen2ForTokenClassification",
    ),
    "qwen3": _decoder(
        "Qwen3Config",
        "Qwen3Model",
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        "Qwen3ForQuestionAnswering",
        "Qwen3ForTokenClassification",
    ),
    "qwen3_moe": _decoder(
        "Qwen3MoeConfig",
        "Qwen3MoeModel",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeForSequenceClassification",
        "Qwen3MoeForQuestionAnswering",
        "Qwen3MoeForTokenClassification",
    ),
}


def native_families() -> tuple[str, ...]:
    """The model types that are known, sorted."""
    return tuple(sorted(_FAMILIES))


def register(
    model_type: str, config: Reference, tasks: Mapping[str, Reference] | None = None, *, exist_ok: bool = False
) -> None:
    """Add a family, or tasks to one.

    Args:
        model_type: as in config.json.
        config: the config class, or ``"module:Name"`` of it.
        tasks: name of an Auto class -> model class.
        exist_ok: replace what is there.

    Raises:
        OptionError: the model type has another config, or one of the tasks, and ``exist_ok`` is False.
    """
    if not model_type:
        raise OptionError("a config that is registered needs a model_type", key="model_type", found=repr(config))
    old = _FAMILIES.get(model_type)
    tasks = dict(tasks or {})
    if old is None:
        _FAMILIES[model_type] = Family(config, tasks)
        return
    taken = [] if exist_ok else [task for task in tasks if task in old.tasks]
    if not exist_ok and config != old.config and _imported(config) is not _imported(old.config):
        taken.append("config class")
    if taken:
        raise OptionError(
            f"{model_type} is registered already",
            key=model_type,
            found=", ".join(taken),
            fix="choose another model_type, or pass exist_ok=True",
        )
    _FAMILIES[model_type] = Family(config, {**old.tasks, **tasks})


def is_native(values: Mapping[str, Any]) -> bool:
    """Whether a config's fields are of a family that is known here, or at least of no other one."""
    model_type, architectures = values.get("model_type"), values.get("architectures")
    if model_type is not None or not architectures:
        return model_type in (None, *_FAMILIES)
    names = {_name(model) for family in _FAMILIES.values() for model in family.tasks.values()}
    return isinstance(architectures, list) and not names.isdisjoint(map(str, architectures))


def family_of(values: Mapping[str, Any], *, file: str | None) -> str:
    """The model type of a config's fields: what they say, or else what their ``architectures`` belong to.

    Raises:
        ConfigError: they say nothing, or a type that is not native.
    """
    model_type, architectures = values.get("model_type"), values.get("architectures")
    if model_type is not None:
        if isinstance(model_type, str) and model_type in _FAMILIES:
            return model_type
        raise _not_native("the model is of a family that fastload does not have", "model_type", model_type, file)
    if not architectures:
        raise _not_native("the config does not say what kind of model it is of", "model_type", None, file)
    for name in architectures if isinstance(architectures, list) else ():
        for known, family in _FAMILIES.items():
            if name in map(_name, family.tasks.values()):
                return known
    raise _not_native("the config names no architecture that fastload has", "architectures", architectures, file)


def config_class_for(model_type: str) -> type[Any]:
    """The config class of a family; ConfigError where there is no such family."""
    if model_type not in _FAMILIES:
        raise _not_native("no such family", "model_type", model_type, None)
    return _imported(_FAMILIES[model_type].config)


def class_for(task: str, model_type: str, *, file: str | None = None) -> type[Any]:
    """The model class of a family for an Auto class's name; ConfigError where the family has none."""
    config_class_for(model_type)
    tasks = _FAMILIES[model_type].tasks
    if task not in tasks:
        raise ConfigError(
            f"{model_type} has no model for {task}",
            file=file,
            key="model_type",
            expected=f"one of {', '.join(sorted(tasks)) or 'nothing: no model is registered'}",
            found=task,
            fix=f"use an Auto class that {model_type} has, or register a model for this one",
        )
    return _imported(tasks[task])


def model_type_of(config_class: type[Any]) -> str | None:
    """The model type that a config class is registered for."""
    for model_type, family in _FAMILIES.items():
        if family.config is config_class or (
            _name(family.config) == config_class.__name__ and _imported(family.config) is config_class
        ):
            return model_type
    return None


def _name(reference: Reference) -> str:
    return reference.partition(":")[2] if isinstance(reference, str) else reference.__name__


def _imported(reference: Reference) -> type[Any]:
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def _not_native(problem: str, key: str, found: object, file: str | None) -> ConfigError:
    families = native_families()
    near = difflib.get_close_matches(str(found), families, n=1) if found is not None else []
    fix = f"did you mean {near[0]!r}? Otherwise " if near else ""
    return ConfigError(
        problem,
        file=file,
        key=key,
        expected=f"one of the native families: {', '.join(families)}",
        found="nothing" if found is None else repr(found),
        fix=f"{fix}register the family with AutoConfig.register, or use a transformers that has it",
    )
