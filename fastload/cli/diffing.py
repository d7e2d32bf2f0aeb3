"""``fastload diff``: in which tensors do two checkpoints differ?

The exit status is that of diff(1): 0 where they are the same, 1 where they differ, 2 where they cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from fastload.checkpoint import Checkpoint
from fastload.cli.arguments import Where
from fastload.cli.output import print_json, print_line, printable
from fastload.errors import FastloadError
from fastload.progress import Progress

__all__ = ["run"]

SAME = 0
DIFFERENT = 1
TROUBLE = 2

_CHUNK_ELEMENTS = 4 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """One key in which two checkpoints differ.

    Attributes:
        key: the tensor.
        kind: "added" (only in the second), "removed" (only in the first), "dtype", "shape" or "values".
        first, second: type and shape in either; None where it is not there.
        n_elements: how many elements have other values.
        max_abs: the largest difference of two elements; NaN where one of them alone is no number, None where only the
            bytes were compared.
    """

    key: str
    kind: str
    first: str | None
    second: str | None
    n_elements: int | None = None
    max_abs: float | None = None

    def __str__(self) -> str:
        if self.kind == "added":
            return f"+ {self.key}: {self.second}"
        if self.kind == "removed":
            return f"- {self.key}: {self.first}"
        if self.kind != "values":
            return f"! {self.key}: {self.first} -> {self.second}"
        size = "" if self.max_abs is None else f", by {self.max_abs:.3g} at most"
        return f"~ {self.key}: {self.n_elements:,} elements differ{size}"


def run(arguments: argparse.Namespace) -> int:
    """Compare two checkpoints tensor by tensor, in whatever formats and shards they are, and say what differs."""
    try:
        where = Where.of(arguments)
        first = Checkpoint(where.locate(in_chunks=True))
        second = Checkpoint(replace(where, path=arguments.other).locate(in_chunks=True))
        with Progress("comparing", first.n_bytes) as progress:
            differences = list(_compare(first, second, progress))
    except FastloadError as error:
        print(f"fastload: {printable(str(error), lines=True)}", file=sys.stderr)
        return TROUBLE
    n_same = len(_keys(first)) - sum(difference.kind != "added" for difference in differences)
    if arguments.json:
        rows = [asdict(difference) for difference in differences]
        print_json({"first": where.path, "second": arguments.other, "n_same": n_same, "differences": rows})
    else:
        for difference in differences:
            print_line(str(difference))
        print_line(f"{n_same:,} tensors are the same, {len(differences):,} differ")
    return DIFFERENT if differences else SAME


def _compare(first: Checkpoint, second: Checkpoint, progress: Progress) -> Iterator[Difference]:
    ours, theirs = _keys(first), _keys(second)
    for key, kept in ours.items():
        spec = first.spec(kept)
        here = f"{spec.dtype.torch_name} {list(spec.shape)}"
        if key not in theirs:
            yield Difference(key, "removed", here, None)
            continue
        other = second.spec(theirs[key])
        there = f"{other.dtype.torch_name} {list(other.shape)}"
        if spec.shape != other.shape:
            yield Difference(key, "shape", here, there)
        elif spec.dtype is not other.dtype:
            yield Difference(key, "dtype", here, there)
        elif (difference := _difference(first[kept], second[theirs[key]])) is not None:
            yield Difference(key, "values", here, there, *difference)
        first.release(kept)
        second.release(theirs[key])
        progress.advance(spec.n_bytes)
    for key, kept in theirs.items():
        if key not in ours:
            spec = second.spec(kept)
            yield Difference(key, "added", None, f"{spec.dtype.torch_name} {list(spec.shape)}")


def _keys(checkpoint: Checkpoint) -> dict[str, str]:
    """Every name, those of tied tensors too -> the key that holds it."""
    return {**{key: key for key in checkpoint}, **checkpoint.aliases}


def _difference(first: torch.Tensor, second: torch.Tensor) -> tuple[int, float | None] | None:
    """How many elements have other bytes, and by how much they differ at most; None if none has."""
    if not first.numel():
        return None
    n_different, largest = 0, 0.0
    is_measurable = True
    ours, theirs = (torch.split(tensor.reshape(-1), _CHUNK_ELEMENTS) for tensor in (first, second))
    for a, b in zip(ours, theirs, strict=True):
        our_bytes, their_bytes = _as_bytes(a), _as_bytes(b)
        differs = (our_bytes != their_bytes).any(dim=1)
        if not differs.any():
            continue
        n_different += int(differs.sum())
        # Chosen as bytes: torch cannot choose among elements of every type.
        a, b = our_bytes[differs].view(a.dtype), their_bytes[differs].view(b.dtype)
        size = _largest(a, b) if is_measurable else None
        is_measurable = size is not None
        largest = largest if size is None else max(largest, size, key=lambda value: (value != value, value))
    if not n_different:
        return None
    return n_different, largest if is_measurable else None


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(len(tensor), -1)


def _largest(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """The largest absolute difference; None for types that torch cannot convert."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    try:
        a, b = a.to(wide), b.to(wide)
    except (NotImplementedError, RuntimeError):  # what torch says of types that it has no conversion for
        return None
    difference = (a - b).abs()
    # Equal infinities and two that are no number are no difference in value, whatever their bits are.
    difference[(a == b) | (a.isnan() & b.isnan())] = 0
    return float(difference.max())
