"""Where fastload's reader of safetensors headers refuses what the official one (0.8) takes, and why.

This is the whole list: a file that the official reader takes and that is on no row here has to be taken, with the same
bytes; one that it refuses has to be refused, without exception. The tests and the fuzz targets hold the reader to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

__all__ = ["STRICTER", "Difference", "difference_of"]


class Difference(NamedTuple):
    """Something that fastload refuses on purpose.

    Attributes:
        what: what stands in the header.
        why: why it is refused.
        applies: whether a header has it, told from its text and its parsed form, in which objects are lists of pairs.
    """

    what: str
    why: str
    applies: Callable[[str, Any], bool]


class Pairs(list[tuple[str, Any]]):
    """A JSON object with every name that stands in it, those that are there twice too."""


def difference_of(header: bytes) -> Difference | None:
    """The first row that applies to a header that the official reader takes; None where both have to agree."""
    text = header.decode()
    parsed = json.loads(text, object_pairs_hook=Pairs)
    return next((row for row in STRICTER if row.applies(text, parsed)), None)


def _has_name_twice(_: str, value: Any) -> bool:
    if isinstance(value, Pairs):
        names = [name for name, _ in value]
        return len(set(names)) < len(names) or any(_has_name_twice("", item) for _, item in value)
    return isinstance(value, list) and any(_has_name_twice("", item) for item in value)


def _entries(header: Any) -> list[Any]:
    return [entry for name, entry in header if name != "__metadata__"]


def _has_array_for_entry(_: str, header: Any) -> bool:
    return any(isinstance(entry, list) and not isinstance(entry, Pairs) for entry in _entries(header))


def _has_odd_row_of_half_bytes(_: str, header: Any) -> bool:
    fields = [dict(entry) for entry in _entries(header) if isinstance(entry, Pairs)]
    return any(f["dtype"] == "F4" and (not f["shape"] or f["shape"][-1] % 2) for f in fields)


def _has_shape_beyond_torch(_: str, header: Any) -> bool:
    fields = [dict(entry) for entry in _entries(header) if isinstance(entry, Pairs)]
    return any(prod(filter(None, f["shape"])) > 2**63 - 1 for f in fields)


STRICTER = (
    Difference(
        "whitespace before the first brace",
        "the format says that a header begins with a brace, and readers that look for it there would refuse the file",
        lambda text, _: text[:1].isspace(),
    ),
    Difference(
        "a name twice in one object",
        "readers disagree on which of the two counts, so that one file could show two contents",
        _has_name_twice,
    ),
    Difference(
        "a tensor described by an array in place of an object",
        "an accident of the official parser that the format's text does not know",
        _has_array_for_entry,
    ),
    Difference(
        "4-bit floats in rows of an odd length, or without rows",
        "torch packs two into an item of a row and has no way to hold half an item",
        _has_odd_row_of_half_bytes,
    ),
    Difference(
        "a shape beyond 2**63 elements, but for a zero in it",
        "torch counts in signed 64-bit numbers and could not hold the tensor",
        _has_shape_beyond_torch,
    ),
)
