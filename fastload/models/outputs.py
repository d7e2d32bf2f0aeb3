"""What models return: named tensors that are a dict, a tuple and an object at once.

One dict holds the values; a field that is None is not in it. Registered with torch's pytree, so that compiled,
exported and data-parallel models can take outputs apart and put them together again.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any, ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "BaseModelOutputWithPoolingAndCrossAttentions",
    "BertForPreTrainingOutput",
    "CausalLMOutputWithCrossAttentions",
    "ClassifierOutput",
    "KeyValues",
    "MaskedLMOutput",
    "ModelOutput",
    "MultipleChoiceModelOutput",
    "NextSentencePredictorOutput",
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
]

Tensors = tuple[Tensor, ...]
# Per layer (key, value), each (batch, heads, tokens, head size); with cross attention (key, value, key, value).
KeyValues = tuple[Tensors, ...]


class ModelOutput(OrderedDict[str, Any]):
    """Base of all outputs. A subclass declares its fields as annotations, in the order of the tuple.

    ``output.logits``, ``output["logits"]`` and ``output[0]`` are the same; ``output.loss`` is None where there is
    none, and is then left out of the dict and the tuple. Made of keywords, of one mapping, or of pairs.
    """

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls._fields = (*cls._fields, *(name for name in inspect.get_annotations(cls) if name not in cls._fields))
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda values, names: cls(zip(names, values, strict=True)),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )

    def __init__(self, values: Any = None, /, **fields: Any) -> None:
        super().__init__()
        # Data-parallel code rebuilds an output from a mapping or from pairs.
        given = dict(values or ()) | fields
        unknown = [name for name in given if name not in self._fields]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {unknown[0]!r}")
        for name in self._fields:
            if given.get(name) is not None:
                super().__setitem__(name, given[name])

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if value is None:
            super().pop(key, None)
            return
        is_new = key not in self
        super().__setitem__(key, value)
        if is_new and key in self._fields:
            # A field that is set late still has its place in the tuple.
            for later in self._fields[self._fields.index(key) + 1 :]:
                if later in self:
                    self.move_to_end(later)

    def __getattr__(self, name: str) -> Any:
        # Only what is not found otherwise comes here.
        if name in self._fields:
            # Not by `get`, which torch.compile of torch 2.6 does not follow.
            return self[name] if name in self else None  # noqa: SIM401
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fields:
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._fields)})"

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in the order of the fields."""
        return tuple(self.values())


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(name), value) for name, value in output.items()], list(output)


class BaseModelOutputWithPoolingAndCrossAttentions(ModelOutput):
    """Of an encoder or decoder without a head.

    Attributes:
        last_hidden_state: (batch, tokens, hidden size).
        pooler_output: (batch, hidden size), made from the first token.
        hidden_states: (batch, tokens, hidden size) of the embeddings and of every layer.
        past_key_values: the cache to be handed to the next call.
        attentions, cross_attentions: (batch, heads, tokens, tokens attended to) of every layer.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    hidden_states: Tensors | None
    past_key_values: KeyValues | None
    attentions: Tensors | None
    cross_attentions: Tensors | None


class CausalLMOutputWithCrossAttentions(ModelOutput):
    """Of a decoder with a language model head: logits are (batch, tokens, vocabulary)."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KeyValues | None
    hidden_states: Tensors | None
    attentions: Tensors | None
    cross_attentions: Tensors | None


class ClassifierOutput(ModelOutput):
    """Of any head with one kind of logits."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: Tensors | None
    attentions: Tensors | None


class MaskedLMOutput(ClassifierOutput):
    """logits are (batch, tokens, vocabulary)."""


class SequenceClassifierOutput(ClassifierOutput):
    """logits are (batch, labels)."""


class TokenClassifierOutput(ClassifierOutput):
    """logits are (batch, tokens, labels)."""


class MultipleChoiceModelOutput(ClassifierOutput):
    """logits are (batch, choices)."""


class NextSentencePredictorOutput(ClassifierOutput):
    """logits are (batch, 2): the second sentence follows, or does not."""


class QuestionAnsweringModelOutput(ModelOutput):
    """start_logits and end_logits are (batch, tokens)."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: Tensors | None
    attentions: Tensors | None


class BertForPreTrainingOutput(ModelOutput):
    """prediction_logits are (batch, tokens, vocabulary), seq_relationship_logits (batch, 2)."""

    loss: Tensor | None
    prediction_logits: Tensor
    seq_relationship_logits: Tensor
    hidden_states: Tensors | None
    attentions: Tensors | None
