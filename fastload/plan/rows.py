"""A plan: what will be done with every tensor, before anything is done.

A plan is data. It can be printed, counted in bytes, and tested without a file or a device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from fastload.dtypes import DType
from fastload.formats.runs import asked_bytes
from fastload.formats.specs import TensorSpec
from fastload.plan.fusing import FusedSpec
from fastload.plan.keys import KeyMatch

__all__ = ["Action", "FusedRow", "LoadPlan", "PlanRow"]


class Action(Enum):
    """How the bytes of a row reach their place."""

    MAP = "map"
    """the parameter is a view of the mapped file: nothing is read until it is used"""
    COPY = "copy"
    """copied as they are, because they are not aligned in the file"""
    DECODE = "decode"
    """decompressed or byte-swapped"""
    FILL = "fill"
    """copied, and converted if need be, into memory that the module already has"""
    CAST = "cast"
    """converted to another dtype"""
    REMAP = "remap"
    """fused: the files' pages are mapped side by side, and only what shares a page with a neighbour is copied"""
    GATHER = "gather"
    """fused: every piece is written into its place, and converted if need be"""
    SLICE = "slice"
    """a rank's part whose rows do not follow each other in the file: copied side by side, and converted if need be"""
    STRIDE = "stride"
    """such a part, used where it lies: a view of the mapped file, its rows as far apart as they are there"""
    EXCHANGE = "exchange"
    """read by one rank of the machine, and handed to the others that need it"""
    MOVE = "move"
    """sent to another device, converted there if need be"""


# Of these the region is what lies between the first byte and the last.
_PARTS = (Action.SLICE, Action.STRIDE, Action.EXCHANGE)


class PlanRow(NamedTuple):
    """One tensor's way from a file into the model.

    Attributes:
        fqn: its name in the model (its key, where there is no model).
        spec: where it is.
        dtype: the type it will have.
        device: the device it will be on.
        action: how it gets there.
        reason: why not by mapping; "" for mapped rows.
    """

    fqn: str
    spec: TensorSpec
    dtype: DType
    device: str
    action: Action
    reason: str = ""


class FusedRow(NamedTuple):
    """The way of many tensors of the files into one of the model; the fields are those of a PlanRow."""

    fqn: str
    spec: FusedSpec
    dtype: DType
    device: str
    action: Action
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """All rows, by file and offset, and what was decided about keys that have none.

    Attributes:
        rows: the tensors that will be placed.
        keys: how the files' keys and the model's names fit.
        mismatched: (name, shape in the file, shape in the model) of tensors that will not be placed.
        fused: the tensors that are made of several.
    """

    rows: tuple[PlanRow, ...]
    keys: KeyMatch
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    fused: tuple[FusedRow, ...] = ()

    @property
    def all_rows(self) -> list[PlanRow | FusedRow]:
        """Those of single tensors, then the fused ones."""
        return [*self.rows, *self.fused]

    @property
    def n_bytes(self) -> int:
        """Bytes in the files of all rows. A storage that several rows share counts once."""
        return sum(self.bytes_by_action().values())

    @property
    def specs(self) -> list[TensorSpec]:
        """What is taken of the files: the tensors of single rows, then the pieces of fused ones."""
        return [row.spec for row in self.rows] + [piece.spec for row in self.fused for piece in row.spec.pieces]

    def bytes_by_action(self) -> dict[str, int]:
        """Bytes in the files by action, in the order in which actions first occur."""
        counts: Counter[str] = Counter()
        seen: set[tuple[Any, ...]] = set()
        for action, rows in groupby(self.rows, attrgetter("action")):
            if action in _PARTS:
                counts[action.value] += sum(row.spec.n_bytes for row in rows)
                continue
            regions = {row.spec.region[:3] for row in rows} - seen
            seen |= regions
            counts[action.value] += sum(n_bytes for _, _, n_bytes in regions)
        for fused in self.fused:
            counts[fused.action.value] += fused.spec.n_bytes
        return {action: n_bytes for action, n_bytes in counts.items() if n_bytes}

    def asked_bytes(self) -> int:
        """Bytes of the files that these rows ask for: mapped, or read with what is read over between two runs."""
        specs = self.specs
        return sum({(spec.region, spec.shape, spec.view): asked_bytes(spec) for spec in specs}.values())

    def bytes_by_outcome(self, n_remapped_bytes: int) -> dict[str, int]:
        """Bytes by what was done: of those that were to be remapped, the edges of pieces had to be copied."""
        counts = self.bytes_by_action()
        planned = counts.pop(Action.REMAP.value, 0)
        if planned:
            counts[Action.REMAP.value] = n_remapped_bytes
            counts[Action.COPY.value] = counts.get(Action.COPY.value, 0) + planned - n_remapped_bytes
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "n_bytes": self.n_bytes,
            "bytes_by_action": self.bytes_by_action(),
            "missing": list(self.keys.missing),
            "unexpected": list(self.keys.unexpected),
            "ignored": list(self.keys.ignored),
            "mismatched": [list(row) for row in self.mismatched],
            "rows": [
                {
                    "fqn": row.fqn,
                    "key": row.spec.key,
                    "file": row.spec.region.file,
                    "offset_bytes": row.spec.region.offset_bytes,
                    "n_bytes": row.spec.n_bytes if row.action in _PARTS else row.spec.region.n_bytes,
                    "from_dtype": row.spec.dtype.code,
                    "dtype": row.dtype.code,
                    "shape": list(row.spec.shape),
                    "device": row.device,
                    "action": row.action.value,
                    "reason": row.reason,
                }
                for row in self.rows
            ],
            "fused": [
                {
                    "fqn": fused.fqn,
                    "keys": [piece.spec.key for piece in fused.spec.pieces],
                    "n_bytes": fused.spec.n_bytes,
                    "from_dtype": fused.spec.dtype.code,
                    "dtype": fused.dtype.code,
                    "shape": list(fused.spec.shape),
                    "device": fused.device,
                    "action": fused.action.value,
                    "reason": fused.reason,
                }
                for fused in self.fused
            ],
        }
