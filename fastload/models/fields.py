"""What the fields of a config may hold: read from the class's annotations, checked with messages that name the file.

The annotations of a config class are the one table of its fields. Reading them here, instead of making a dataclass
of every config, lets a config keep fields that its class has never heard of.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastload.errors import ConfigError

__all__ = ["Bounds", "Field", "check_range", "check_type", "declared_fields", "naming_file"]

# JSON knows one kind of number: an integer is a good value for a float field, a boolean for neither.
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
    "None": (types.NoneType,),
    "list": (list, tuple),
    "dict": (dict,),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a config class: its default and the types it takes (empty where anything goes)."""

    name: str
    default: Any
    annotation: str
    types: tuple[type, ...]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Smallest and largest value a number may have. The largest keeps a hostile config from claiming all memory."""

    least: float
    most: float


def _spelled(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _accepted_types(annotation: str) -> tuple[type, ...]:
    """The types an annotation such as ``"int | None"`` or ``"list[str]"`` stands for; empty if one is not known."""
    accepted: list[type] = []
    for part in annotation.split("|"):
        plain = part.strip().partition("[")[0]
        if plain not in _TYPES:
            return ()
        accepted += _TYPES[plain]
    return tuple(accepted)


def declared_fields(cls: type) -> dict[str, Field]:
    """Name -> field, of a config class and its bases. An annotation without a default is none, nor is a ClassVar."""
    return _declared_fields(cls)


@cache
def _declared_fields(cls: type) -> dict[str, Field]:
    found: dict[str, Field] = {}
    for owner in reversed(cls.__mro__):
        for name, annotation in inspect.get_annotations(owner).items():
            spelled = _spelled(annotation)
            if name.startswith("_") or "ClassVar" in spelled or name not in vars(owner):
                continue
            found[name] = Field(name, getattr(cls, name), spelled, _accepted_types(spelled))
    return found


def check_type(field: Field, value: Any) -> None:
    """Raise ConfigError where ``value`` has none of the field's types."""
    is_bool = isinstance(value, bool)
    if not field.types or (bool in field.types if is_bool else isinstance(value, field.types)):
        return
    raise ConfigError(
        f"the field {field.name} of the config has the wrong type",
        key=field.name,
        expected=field.annotation,
        found=_shown(value),
        fix="correct the value in config.json, or pass a good one as a keyword",
    )


def check_range(name: str, value: Any, bounds: Bounds) -> None:
    """Raise ConfigError where a number lies outside its bounds; None and other types are not numbers."""
    if not isinstance(value, (int, float)) or bounds.least <= value <= bounds.most:
        return
    raise ConfigError(
        f"the field {name} of the config is out of range",
        key=name,
        expected=f"{bounds.least:,} to {bounds.most:,}",
        found=_shown(value),
        fix="correct the value in config.json, or pass a good one as a keyword",
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}... ({type(value).__name__})"


@contextmanager
def naming_file(file: str | None) -> Iterator[None]:
    """A ConfigError raised inside gains the file that the bad value came from."""
    try:
        yield
    except ConfigError as error:
        if file is None or error.file is not None:
            raise
        raise ConfigError(
            error.problem, file=file, key=error.key, expected=error.expected, found=error.found, fix=error.fix
        ) from None
