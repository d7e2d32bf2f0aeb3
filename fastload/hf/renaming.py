"""Which keys of the files make which tensors of a transformers model.

transformers says it by a list of transforms: renamings, which change a key, and converters, which also gather the
tensors of several keys and apply operations. They are asked here as transformers asks them (the transforms themselves
record whether they were used, and saving depends on it), but nothing is compiled or copied for each tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["Renamed", "Source", "rename_keys"]


@dataclass(slots=True)
class Source:
    """What one name of the model is made of.

    Attributes:
        name: the name; for a converter that makes several, the first of them.
        converter: None where one key's tensor is used as it is.
        keys: pattern of the converter -> keys that it matched, in natural order; the key itself without a converter.
    """

    name: str
    converter: Any
    keys: dict[str, list[str]] = field(default_factory=dict)


@dataclass(slots=True)
class Renamed:
    """All sources in the order of their first keys, and the names that keys have which the model does not want."""

    sources: dict[str, Source]
    unexpected: list[str]


def rename_keys(keys: Iterable[str], transforms: Iterable[Any], model: Any, wanted: Mapping[str, Any]) -> Renamed:
    """Match keys of the files with names of the model.

    Args:
        keys: of the files.
        transforms: transformers' weight mapping of this load.
        model: the model; what it says of its prefix counts.
        wanted: the model's state dict.
    """
    transforms = list(transforms)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    found = Renamed({}, [])
    for key in sorted(keys, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if name in wanted:
            converter = None if pattern is None else converter_of[pattern]
            source = found.sources.get(name)
            if source is None:
                source = found.sources[name] = Source(name, converter)
            source.keys.setdefault(key if pattern is None else pattern, []).append(key)
        elif pattern is None:
            found.unexpected.append(name)
        else:
            targets = converter_of[pattern].target_patterns
            found.unexpected += [name.replace(targets[0], target) for target in targets]
    return found


def _natural(key: str) -> list[tuple[int, int | str, int]]:
    """Sorts numbers as numbers, whether they are a part of a key or end one, as transformers does."""
    return [_natural_part(part) for part in key.split(".")]


@cache
def _natural_part(part: str) -> tuple[int, int | str, int]:
    # The shape is the same for all, with -1 for "no number": a text without one comes before those that have it.
    if part.isdigit():
        return 0, int(part), -1
    text = part.rstrip("0123456789")
    return 1, text, int(part[len(text) :]) if len(text) < len(part) else -1
