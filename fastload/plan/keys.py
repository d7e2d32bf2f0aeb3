"""Which key of the files goes to which name of the model.

Pure: names in, names out. The order of precedence for a key is

1. the caller's key_mapping, applied to the key as transformers applies it (each pattern, in order);
2. the key as it is, if the model has that name;
3. old spellings (`LayerNorm.gamma` for `LayerNorm.weight`), and the base model's prefix added or dropped
   (a base checkpoint into a model with a head, and back).

A name that two keys would fill belongs to the one that needed the least change; the other is unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from fastload.errors import OptionError
from fastload.plan.fusing import Fusion
from fastload.plan.slots import Slot

__all__ = ["KeyMatch", "KeyRules", "match_keys"]

# Names that checkpoints converted from TensorFlow still carry.
_OLD_SPELLINGS = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRules:
    """What an architecture knows of its keys.

    Attributes:
        base_prefix: attribute under which a model with a head holds its base model; "" for none.
        ignore_missing: patterns of names whose absence is no news.
        ignore_unexpected: patterns of keys that old checkpoints carry and the model has no need of.
        keep_in_fp32: parts of names that stay float32 in a model loaded as float16, whose range they overflow.
        fusions: tensors of the model that checkpoints keep in pieces.
        spellings: parts of names as checkpoints have them -> as the model has them.
    """

    base_prefix: str = ""
    ignore_missing: tuple[str, ...] = ()
    ignore_unexpected: tuple[str, ...] = ()
    keep_in_fp32: tuple[str, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class KeyMatch:
    """The outcome: every key of the files and every name of the model is in exactly one place.

    Attributes:
        fqn_of_key: key in the files -> name in the model.
        missing: names that no key fills, in the model's order.
        unexpected: keys that fill no name.
        ignored: keys that fill no name and are known not to matter.
    """

    fqn_of_key: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]


def match_keys(
    keys: Collection[str],
    slots: Mapping[str, Slot],
    rules: KeyRules,
    key_mapping: Mapping[str, str] | None = None,
    *,
    others: Iterable[str] = (),
) -> KeyMatch:
    """Match the files' keys with the model's names. Other keys are those of what can fill no name.

    OptionError where a pattern of key_mapping is not one.
    """
    rename = _compile_mapping(key_mapping)
    fqn_of_key: dict[str, str] = {}
    taken: set[str] = set()
    later: list[tuple[str, str]] = []
    for key in keys:
        name = rename(key)
        slot = slots.get(name)
        if slot is not None and slot.persistent and name not in taken:
            fqn_of_key[key] = name
            taken.add(name)
        else:
            later.append((key, name))

    unexpected: list[str] = []
    ignored: list[str] = []
    is_ignorable = _any_pattern(rules.ignore_unexpected)
    spellings = (*_OLD_SPELLINGS, *rules.spellings)
    for key, name in later:
        candidates = list(_other_names(name, rules.base_prefix, spellings))
        fqn = next((c for c in candidates if c in slots and slots[c].persistent and c not in taken), None)
        if fqn is not None:
            fqn_of_key[key] = fqn
            taken.add(fqn)
        elif is_ignorable(name) or any(c in slots and not slots[c].persistent for c in (name, *candidates)):
            ignored.append(key)
        else:
            unexpected.append(key)

    for key in others:
        (ignored if is_ignorable(rename(key)) else unexpected).append(key)

    is_expendable = _any_pattern(rules.ignore_missing)
    missing = tuple(fqn for fqn in _unfilled(slots, taken) if not is_expendable(fqn))
    return KeyMatch(fqn_of_key, missing, tuple(unexpected), tuple(ignored))


def _unfilled(slots: Mapping[str, Slot], taken: set[str]) -> Iterable[str]:
    """Names without a key; of a tied group only the first name, and only if no name of the group has a key."""
    filled_groups = {slots[fqn].tied_to or fqn for fqn in taken}
    for fqn, slot in slots.items():
        if slot.persistent and slot.tied_to is None and fqn not in filled_groups:
            yield fqn


def _other_names(name: str, base_prefix: str, spellings: Iterable[tuple[str, str]]) -> Iterable[str]:
    """The names a key can stand for, from the least change to the most."""
    respelt = name
    for old, new in spellings:
        respelt = respelt.replace(old, new)
    prefix = f"{base_prefix}."
    for candidate in (respelt,) if respelt == name else (respelt, name):
        yield candidate
        if base_prefix:
            yield prefix + candidate
            if candidate.startswith(prefix):
                yield candidate[len(prefix) :]


def _compile_mapping(key_mapping: Mapping[str, str] | None) -> Callable[[str], str]:
    if not key_mapping:
        return lambda key: key
    substitutions = [partial(_compile(pattern).sub, replacement) for pattern, replacement in key_mapping.items()]

    def rename(key: str) -> str:
        for substitute in substitutions:
            key = substitute(key)
        return key

    return rename


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError("key_mapping holds a pattern that is none", key=pattern, found=str(error)) from error


def _any_pattern(patterns: Iterable[str]) -> Callable[[str], bool]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)
