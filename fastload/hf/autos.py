"""transformers' Auto classes, whose models fastload loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from fastload.hf.loading import loading_class, read_ahead_for
from fastload.hf.switching import enabled
from fastload.hf.versions import unsupported_reason

__all__ = ["auto_class", "auto_names", "knows_family"]


def auto_names() -> list[str]:
    """The names of all Auto classes of models that the installed transformers has."""
    return [name for name, value in vars(modeling_auto).items() if name.startswith("Auto") and _is_auto(value)]


def auto_class(name: str) -> Any:
    """The Auto class of a name: transformers' own, but for what it loads models by.

    Raises:
        AttributeError: transformers has no such class.
    """
    original = getattr(transformers, name, None) or getattr(modeling_auto, name, None)
    if original is None:
        raise AttributeError(f"transformers {transformers.__version__} has no {name}")
    if unsupported_reason() or not _is_auto(original) or original._model_mapping is None:
        return original

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # Before the modelling code is imported, which takes seconds.
        read_ahead_for(args, kwargs)
        # The class of a checkpoint's own modelling file is not looked up in the mapping.
        with enabled() if kwargs.get("trust_remote_code") else nullcontext():
            return original.from_pretrained.__func__(cls, *args, **kwargs)

    names = {"__module__": "fastload.hf", "__qualname__": name, "__doc__": original.__doc__}
    mapping = _LoadingMapping(original._model_mapping)
    methods = {"from_pretrained": classmethod(from_pretrained), "_model_mapping": mapping}
    return type(name, (original,), names | methods)


def knows_family(model_type: str) -> bool:
    """Whether the installed transformers has a model type."""
    return model_type in transformers.CONFIG_MAPPING


def _is_auto(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, _BaseAutoModelClass)


class _LoadingMapping(Mapping[Any, Any]):
    """A mapping of config classes to model classes that gives, of each, the class that fastload loads it by."""

    def __init__(self, mapping: Any) -> None:
        self._mapping = mapping

    def __getitem__(self, config_class: Any) -> Any:
        found = self._mapping[config_class]
        if isinstance(found, (list, tuple)):
            return tuple(map(loading_class, found))
        return loading_class(found)

    def __len__(self) -> int:
        return len(self._mapping)

    def __contains__(self, config_class: object) -> bool:
        return config_class in self._mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mapping, name)
