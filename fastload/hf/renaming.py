"""Which keys of the files make which tensors of a transformers model.

transformers says it by a list of transforms: renamings, which change a key, and converters, which also gather the
tensors of several keys and apply operations. It asks each of them about each key, 20 microseconds a key. Keys differ
mostly in their numbers (of a layer, of an expert), and patterns treat one number as another: so the transforms are
asked once for all keys of one form, and the numbers are put into what they said. Transforms whose answer may depend
on a number, or on what was asked before, have all keys asked one by one.

The transforms record whether they were used, and saving depends on it; so they themselves are asked, not copies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any

from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

__all__ = ["Renamed", "Source", "rename_keys"]

# A number between dots, as in "layers.11.weight".
_NUMBER = re.compile(r"(?:(?<=\.)|^)([0-9]+)(?=\.|$)")
# The parts of a pattern for which one number is as another: no digits, unless a letter before them says that they are
# not a number between dots, and no wildcard of one character on its own.
_TOKEN = re.compile(
    r"""(?P<text>[A-Za-z_-][A-Za-z0-9_-]*) | (?P<dot>\\\.) | (?P<any>\.(?![*+?]))
    | (?P<wild>(?:\.|\\d|\\w|\[\^\.\])[*+]\??) | (?P<edge>\\w(?![*+?]))
    | (?P<alternative>\|) | (?P<begin>\^) | (?P<end>\$)
    | (?P<group>\((?:\?:|\?!|\?=|\?P<g[0-9]+>)?|\))
    """,
    re.VERBOSE,
)


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
    """All sources, and the names of keys that the model does not want."""

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
    asker = _Asker(transforms, model.base_model_prefix, wanted)
    asked = asker.ask_by_form(keys) if all(map(_is_blind_to_numbers, transforms)) else asker.ask_each(keys)
    converter_of = {pattern: converter for converter in asker.converters for pattern in converter.source_patterns}
    found = Renamed({}, [])
    for name, matched in asked.items():
        if name in wanted:
            # Of several answers for one name, that of the first key says whether a converter makes the tensor.
            patterns = sorted(matched, key=lambda pattern: natural_order(matched[pattern][0]))
            converter = None if patterns[0] is None else converter_of[patterns[0]]
            source = found.sources[name] = Source(name, converter)
            for pattern in patterns:
                source.keys.update(
                    {key: [key] for key in matched[pattern]} if pattern is None else {pattern: matched[pattern]}
                )
            continue
        for pattern in matched:
            targets = [""] if pattern is None else converter_of[pattern].target_patterns
            found.unexpected += [name.replace(targets[0], target) if target else name for target in targets]
    return found


_Answers = dict[str, dict[str | None, list[str]]]
"""Name in the model -> pattern of the converter that takes the keys, or None -> keys in natural order."""


class _Asker:
    """Asks the transforms of one load."""

    def __init__(self, transforms: list[Any], prefix: str, wanted: Mapping[str, Any]) -> None:
        self.renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix = prefix
        self._wanted = wanted

    def ask_each(self, keys: Iterable[str]) -> _Answers:
        """Ask about every key, in natural order."""
        answers: _Answers = {}
        for key in sorted(keys, key=natural_order):
            name, pattern = self._checked(key, *rename_source_key(key, self.renamings, self.converters))
            answers.setdefault(name, {}).setdefault(pattern, []).append(key)
        return answers

    def ask_by_form(self, keys: Iterable[str]) -> _Answers:
        """Ask once about all keys that differ in numbers only."""
        forms: dict[tuple[str, ...], list[tuple[tuple[int, ...], str, list[str]]]] = {}
        for key in keys:
            parts = _NUMBER.split(key)
            members = forms.setdefault(tuple(parts[::2]), [])
            members.append((tuple(map(int, parts[1::2])), key, parts))
        answers: _Answers = {}
        unsorted: list[list[str]] = []
        for texts, members in forms.items():
            members.sort()
            pieces, pattern = self._ask_form(texts)
            names: dict[tuple[str, ...], list[str]] = {}
            for _, key, parts in members:
                numbers = tuple([parts[at] for at in pieces if isinstance(at, int)])
                same = names.get(numbers)
                if same is None:
                    name = "".join([parts[at] if isinstance(at, int) else at for at in pieces])
                    is_wanted = self._fitted(name) in self._wanted
                    name, taken_by = self._checked(key, name, pattern)
                    same = answers.setdefault(name, {}).setdefault(taken_by, [])
                    if same:
                        unsorted.append(same)
                    if is_wanted:
                        names[numbers] = same
                same.append(key)
        for same in unsorted:
            same.sort(key=natural_order)
        return answers

    def _ask_form(self, texts: tuple[str, ...]) -> tuple[list[str | int], str | None]:
        """The name for a form, as texts and as places in the parts of a key, and the converter's pattern."""
        # What stands for the numbers is found again in the name, and is in none of the texts.
        lead = next(lead for lead in map(str, count(731)) if lead not in "".join(texts))
        stand_ins = [f"{lead}{index:07}" for index in range(len(texts) - 1)]
        key = "".join([text + number for text, number in zip(texts, (*stand_ins, ""), strict=True)])
        name, pattern = rename_source_key(key, self.renamings, self.converters)
        place = {number: 2 * index + 1 for index, number in enumerate(stand_ins)}
        return [place.get(piece, piece) for piece in re.split(f"({lead}[0-9]{{7}})", name)], pattern

    def _checked(self, key: str, name: str, pattern: str | None) -> tuple[str, str | None]:
        """The name with the base model's prefix added or dropped, or that of the key itself, if these are wanted."""
        fitted = self._fitted(name)
        if fitted not in self._wanted and key in self._wanted:
            return self._fitted(key), None
        return fitted, pattern

    def _fitted(self, name: str) -> str:
        shorter = name[len(self._prefix) + 1 :] if len(name) > len(self._prefix) else name
        if name.startswith(self._prefix) and shorter in self._wanted:
            return shorter
        longer = f"{self._prefix}.{name}"
        return longer if longer in self._wanted else name


def _is_blind_to_numbers(transform: Any) -> bool:
    """Whether what a transform says of a key is the same for all numbers in it, and for all orders of asking."""
    if type(transform) not in (WeightRenaming, WeightConverter, PrefixChange):
        return False
    scopes = [scope or "" for scope in (transform.scope_prefix, transform.base_model_prefix)]
    return not re.search("[0-9]", "".join(scopes)) and _treats_numbers_alike(transform.compiled_sources.pattern)


@lru_cache(maxsize=4096)
def _treats_numbers_alike(pattern: str) -> bool:
    """Whether a pattern matches a key whatever its numbers are, and how many digits they have.

    No where it says so in ways that are not looked into here.
    """
    kinds: list[str] = []
    at = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            return False
        at = token.end()
        kinds.append(str(token.lastgroup))
    kinds = [kind for kind in kinds if kind != "group"]
    around = zip(["begin", *kinds], kinds, [*kinds[1:], "end"], strict=False)
    for before, kind, after in around:
        if kind == "any" and "text" not in (before, after):
            return False
        # Two wildcards side by side divide a number between them.
        if kind == "wild" and after in ("wild", "any"):
            return False
    # What was matched is replaced where its text stands first, which may be elsewhere if the match is at the end.
    return not ({"wild", "end"} <= set(kinds))


def natural_order(key: str) -> list[tuple[int, int | str, int]]:
    """Sorts numbers as numbers, whether they are a part of a key or end one, as transformers does."""
    return [_natural_part(part) for part in key.split(".")]


@lru_cache(maxsize=1 << 16)
def _natural_part(part: str) -> tuple[int, int | str, int]:
    # The shape is the same for all, with -1 for "no number": a text without one comes before those that have it.
    if part.isdecimal():
        return 0, int(part), -1
    text = part.rstrip("0123456789")
    return 1, text, int(part[len(text) :]) if len(text) < len(part) else -1
