"""Weights that lie elsewhere than they compute: a unit is brought there when it is used, and the next one meanwhile.

Who uses a unit takes its tensors from here and forgets them after its forward. Two units have memory where they
compute: the one in use, and the one on its way there.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastload.errors import DeviceMemoryError, FastloadError
from fastload.placement.device import Prepared, Staged, Staging, begin_all, prepare_all
from fastload.plan.rows import FusedRow, PlanRow
from fastload.storage.readahead import Extent
from fastload.streaming.blocks import block_error
from fastload.streaming.pages import extents_of
from fastload.streaming.reading import Descriptors, ask_for, joined

__all__ = ["Ahead"]

_LOG = logging.getLogger("fastload")
_ONE_GROUP = 0


class _Unit(NamedTuple):
    """How a unit is brought: what is staged, and what is read into the page cache."""

    staged: tuple[Prepared, ...]
    read: list[Extent]


class Ahead:
    """Brings units in the order of their use. What is under way ends with this object.

    Args:
        rows: unit -> its rows, in the order of use. Those bound for accelerators that staging reaches are brought
            there; what of the files the others are made of is read into the page cache.
        staging: how rows reach accelerators.
        files: the files, held.
    """

    def __init__(self, rows: Mapping[str, Sequence[PlanRow | FusedRow]], staging: Staging, files: Descriptors) -> None:
        self._rows = {unit: of_unit for unit, of_unit in rows.items() if of_unit}
        order = list(self._rows)
        self._next = dict(zip(order, order[1:] + order[:1], strict=True))
        self._staging = staging.for_blocks()._replace(path_of=files.path_of)
        self._files = files
        self._units: dict[str, _Unit] = {}
        self._coming: dict[str, tuple[Staged, ...]] = {}
        self._lock = threading.Lock()
        self._unit = ""
        self._in_use: tuple[Staged, ...] = ()
        self._tensors: dict[str, torch.Tensor] = {}
        self._is_short = False
        weakref.finalize(self, _cancel, self._coming)
        if order:
            self._begin_ahead(order[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> Ahead:
        """Copies of a model share it."""
        return self

    def take(self, unit: str) -> Mapping[str, torch.Tensor]:
        """The tensors of a unit that are on accelerators by now, or will be when what is asked of these comes to it.

        Of a unit that has no rows there are none.

        Raises:
            BlockError: it could not be read, or there is too little memory where it should go.
        """
        with self._lock:
            if unit not in self._rows:
                return {}
            if unit == self._unit:
                return self._tensors
            try:
                self._let_go()
                coming = self._coming.pop(unit, None)
                if coming is None:
                    coming = self._begin(unit)
                self._begin_ahead(self._next[unit])
                for staged in coming:
                    staged.transfer.hold_back(_ONE_GROUP)
            except FastloadError as error:
                # What else was begun may have met the same.
                _cancel(self._coming)
                self._coming.clear()
                raise block_error(unit, error) from error
            self._unit, self._in_use = unit, coming
            self._tensors = {name: tensor for staged in coming for name, tensor in staged.tensors.items()}
            return self._tensors

    def _let_go(self) -> None:
        """Keep nothing of the unit that was in use; its transfer does not either, once it has ended."""
        used, self._in_use, self._unit, self._tensors = self._in_use, (), "", {}
        for staged in used:
            staged.transfer.wait()

    def _begin(self, unit: str) -> tuple[Staged, ...]:
        if unit not in self._units:
            self._units[unit] = self._planned(self._rows[unit])
        staged = begin_all(self._units[unit].staged, self._staging)
        for extent in self._units[unit].read:
            ask_for(extent, self._files)
        return staged

    def _planned(self, rows: Sequence[PlanRow | FusedRow]) -> _Unit:
        staged = prepare_all(rows, self._staging, lambda fqn: _ONE_GROUP)
        on_devices = {name for one in staged for wanted in one.plan.wanted for name in wanted.names}
        read = joined(extent for row in rows if row.fqn not in on_devices for extent in extents_of(row))
        return _Unit(staged, read)

    def _begin_ahead(self, unit: str) -> None:
        """Begin a unit before it is used. Whatever is in the way of that is told when it is used."""
        if unit in self._coming:
            return
        try:
            self._coming[unit] = self._begin(unit)
        except DeviceMemoryError as error:
            if not self._is_short:
                _LOG.warning("no block comes while another computes, for want of device memory: %s", str(error))
            self._is_short = True
        except FastloadError:
            pass


def _cancel(coming: dict[str, tuple[Staged, ...]]) -> None:
    for of_unit in coming.values():
        for staged in of_unit:
            staged.transfer.cancel()
