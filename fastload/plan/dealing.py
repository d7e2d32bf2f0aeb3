"""Who of a node's ranks reads what, so that every byte that several of them need is read by one.

Pure. Each rank says which box of which tensor it needs; all of them make the same rounds of these lists. In a round
every rank reads units of a limited size and hands each rank its part of them. What one rank alone needs is not dealt:
that rank has it by its own means, mapped where it can be. Two things are: boxes that several ranks need, and boxes
side by side whose rows are short runs of the file. The latter are read as one box, rows whole, since storage gives
whole pages, and a page at the end of a run is the neighbour's as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import prod
from typing import NamedTuple

from fastload.formats.runs import runs_of
from fastload.formats.specs import TensorSpec
from fastload.plan.boxes import Box, inside, narrow, overlap

__all__ = ["Round", "Unit", "deal"]

# From this length on the pages at both ends of a run weigh little.
_LONG_RUN_BYTES = 64 << 10


class Unit(NamedTuple):
    """A box of a tensor that one rank reads.

    Attributes:
        key: the tensor's key.
        box: what is read of it.
        wanted: rank of the node -> the box of the tensor that it is handed, within the unit's.
    """

    key: str
    box: Box
    wanted: Mapping[int, Box]


Round = tuple[tuple[Unit, ...], ...]
"""What each rank of the node reads before parts are handed over."""


def deal(specs: Mapping[str, TensorSpec], needs: Sequence[Mapping[str, Box]], most_bytes: int) -> list[Round]:
    """The rounds in which ranks of a node read for each other.

    Args:
        specs: the tensors of the files by key; each raw and contiguous in its file.
        needs: for each rank of the node, key -> the box that it needs.
        most_bytes: what a rank reads in a round; a single row of a tensor may be more.
    """
    shared = (key for key in specs if sum(key in need for need in needs) > 1)
    ordered = sorted(shared, key=lambda key: specs[key].region[:2])
    units = [unit for key in ordered for unit in _units(specs[key], key, needs, most_bytes)]
    rounds: list[list[list[Unit]]] = []
    rank, n_bytes = len(needs), 0
    for unit in units:
        n_unit_bytes = prod(unit.box.shape) * specs[unit.key].dtype.itemsize
        if not rounds or n_bytes + n_unit_bytes > most_bytes:
            rank, n_bytes = rank + 1, 0
        if rank >= len(needs):
            rounds.append([[] for _ in needs])
            rank = 0
        rounds[-1][rank].append(unit)
        n_bytes += n_unit_bytes
    return [tuple(tuple(units) for units in one) for one in rounds]


def _units(spec: TensorSpec, key: str, needs: Sequence[Mapping[str, Box]], most_bytes: int) -> Iterator[Unit]:
    wanted = {rank: need[key] for rank, need in enumerate(needs) if key in need and 0 not in need[key].shape}
    for box in _boxes_read(spec, set(wanted.values())):
        ranks = {rank: part for rank, part in wanted.items() if inside(part, box)}
        if len(ranks) < 2:
            continue
        for band in _bands(box, spec.dtype.itemsize, most_bytes):
            parts = {rank: overlap(part, band) for rank, part in ranks.items()}
            yield Unit(key, band, {rank: part for rank, part in parts.items() if prod(part.shape)})


def _boxes_read(spec: TensorSpec, boxes: set[Box]) -> list[Box]:
    """The boxes that are read so that all of these can be handed over, no byte twice."""
    if len(boxes) < 2:
        return list(boxes)
    around = _around(boxes)
    is_apart = all(not prod(overlap(a, b).shape) for a, b in combinations(boxes, 2))
    if not is_apart:
        return [around]
    fills = sum(prod(box.shape) for box in boxes) == prod(around.shape)
    parts = [narrow(spec, box) for box in boxes]
    is_short = any(part.view is not None and runs_of(part).n_bytes < _LONG_RUN_BYTES for part in parts)
    return [around] if fills and is_short else sorted(boxes)


def _around(boxes: set[Box]) -> Box:
    """The smallest box that has all of these in it."""
    ends = [[begin + size for begin, size in zip(*box, strict=True)] for box in boxes]
    offset = tuple(min(begins) for begins in zip(*(box.offset for box in boxes), strict=True))
    return Box(
        offset, tuple(max(of_dim) - begin for begin, of_dim in zip(offset, zip(*ends, strict=True), strict=True))
    )


def _bands(box: Box, itemsize: int, most_bytes: int) -> Iterator[Box]:
    """A box in parts of no more than most_bytes, along its first dimension and then the next."""
    n_bytes = prod(box.shape) * itemsize
    dim = next((dim for dim, size in enumerate(box.shape) if size > 1), None)
    if n_bytes <= most_bytes or dim is None:
        yield box
        return
    n = max(1, most_bytes * box.shape[dim] // n_bytes)
    for begin in range(0, box.shape[dim], n):
        offset = (*box.offset[:dim], box.offset[dim] + begin, *box.offset[dim + 1 :])
        shape = (*box.shape[:dim], min(n, box.shape[dim] - begin), *box.shape[dim + 1 :])
        yield from _bands(Box(offset, shape), itemsize, most_bytes)
