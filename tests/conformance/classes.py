"""The model classes that transformers' Auto mappings can reach."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto


@dataclass(frozen=True, slots=True, order=True)
class Reachable:
    """A class that an Auto mapping names; `family` is the package under `transformers.models` that defines it."""

    family: str
    class_name: str

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class itself, imported.

        Raises:
            AttributeError: the mapping names a class that its family does not export.
        """
        return getattr(import_module(f"transformers.models.{self.family}"), self.class_name)


def reachable_classes() -> list[Reachable]:
    """Every class that any `MODEL_*_MAPPING` names, once, sorted by family. Imports none of them."""
    named = {
        class_name: configuration_auto.model_type_to_module_name(model_type)
        for mapping in vars(modeling_auto).values()
        if isinstance(mapping, modeling_auto._LazyAutoMapping)
        for model_type, class_names in mapping._model_mapping.items()
        for class_name in _each(class_names)
    }
    return sorted(Reachable(_home(class_name) or family, class_name) for class_name, family in named.items())


def _home(class_name: str) -> str:
    """The family whose module defines a class, which need not be the one that the mapping names it for."""
    module = transformers._class_to_module.get(class_name, "")
    return module.split(".")[1] if module.startswith("models.") else ""


def _each(names: str | tuple[str, ...]) -> Iterator[str]:
    yield from (names,) if isinstance(names, str) else names
