"""Models larger than memory: blocks that fit stay, the others are read for each forward while the one before computes.

A forward goes through the blocks in a circle, for which keeping what was used last is the worst of policies: each
block is thrown out just before its turn. So some blocks stay, and of the others each is read ahead, used and let go:
what must be read is what does not fit, at the rate of the disk, and nothing is ever pushed out.

On an accelerator the blocks that pass are brought there through pinned memory, the next one while one computes.

Weights that need no conversion are mapped once and for all; only their pages come and go. Others are made for the
forward and dropped after it. What is written to a mapped weight stays in memory, beyond the budget; what is written to
one that is made for each forward is lost with it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from fastload.errors import OptionError
from fastload.placement.device import Prepared, Staged, Staging, begin_all, prepare_all
from fastload.placement.placing import place_all
from fastload.plan.rows import Action, FusedRow, LoadPlan, PlanRow
from fastload.reports import format_bytes
from fastload.storage.mapping import MappedFile
from fastload.streaming.blocks import REST, Units, block_error
from fastload.streaming.deferring import Place, places_of, plan_of, put
from fastload.streaming.experts import RoutedExperts, routed_rows
from fastload.streaming.pages import FileMappings, MappedPart, extents_of, let_go, parts_of, stop_reading_around
from fastload.streaming.reading import Descriptors, Reader, Ticket

__all__ = ["Budget", "Division", "divide"]

Row = PlanRow | FusedRow
_MAPPED = frozenset({Action.MAP, Action.REMAP})
_ONE_GROUP = 0
# Blocks that must have room beside what stays: the one that computes, and the one that is read.
_LEAST_WINDOW = 2
# From here on it does not matter that the kernel reads some way behind a block, and keeps pages in units of megabytes.
_LARGE_BLOCK_BYTES = 16 << 20


class _Watched(NamedTuple):
    """A mapped tensor that comes and goes: itself, where it lay, how often it had been written to, and its pages."""

    tensor: weakref.ref[torch.Tensor]
    address: int
    version: int
    parts: list[MappedPart]


class _Coming(NamedTuple):
    """A unit on its way: to the page cache, and to accelerators."""

    ticket: Ticket
    staged: tuple[Staged, ...]

    def wait(self) -> int:
        """Wait until it is there, or have the accelerators wait. Returns the bytes that were read from the disk."""
        for staged in self.staged:
            staged.transfer.hold_back(_ONE_GROUP)
        return self.ticket.wait()

    def cancel(self) -> None:
        """Begin no more, and end what is under way."""
        self.ticket.cancel()
        for staged in self.staged:
            staged.transfer.cancel()


class Division:
    """Which units stay.

    Attributes:
        rows: unit -> its rows.
        n_bytes: unit -> bytes of its weights in memory.
        experts: modules of routed experts -> their rows, of which the last used stay; none where everything fits.
        experts_bytes: most bytes of these.
        staying: units that stay.
        passing: units that come and go, in order.
        window_bytes: most bytes of passing units at a time.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Row]],
        order: Sequence[str],
        budget_bytes: int,
        experts: Mapping[str, Sequence[Row]],
    ) -> None:
        self.experts: Mapping[str, Sequence[Row]] = {}
        self.experts_bytes = 0
        routed_bytes = sum(_memory_bytes(row) for of_module in experts.values() for row in of_module)
        whole_bytes = sum(_memory_bytes(row) for of_unit in rows.values() for row in of_unit)
        if experts and whole_bytes > budget_bytes:
            routed = {row.fqn for of_module in experts.values() for row in of_module}
            rows = {unit: [row for row in of_unit if row.fqn not in routed] for unit, of_unit in rows.items()}
            dense_bytes = whole_bytes - routed_bytes
            self.experts = experts
            # What is used by every token has precedence; where it does not fit either, both get their share.
            self.experts_bytes = budget_bytes - dense_bytes if dense_bytes <= budget_bytes // 2 else budget_bytes // 2
            budget_bytes -= self.experts_bytes
        self.rows = rows
        self.n_bytes = {unit: sum(_memory_bytes(row) for row in of_unit) for unit, of_unit in rows.items()}
        order = [unit for unit in order if unit in rows]
        blocks = [unit for unit in order if unit != REST]
        rest_bytes = self.n_bytes.get(REST, 0)
        self.staying = set(order)
        self.passing: list[str] = []
        self.window_bytes = 0
        if sum(self.n_bytes.values()) <= budget_bytes:
            return
        largest = max(blocks, key=self.n_bytes.__getitem__, default=REST)
        least_bytes = rest_bytes + _LEAST_WINDOW * self.n_bytes.get(largest, 0)
        if not blocks or least_bytes > budget_bytes:
            raise OptionError(
                "the memory budget is too small for this model",
                key=largest or "the parts outside of blocks",
                expected=f"at least {format_bytes(least_bytes)}: what is in no block, and two of the largest block",
                found=format_bytes(budget_bytes),
                fix="raise memory_budget, or load with a smaller dtype",
            )
        left = budget_bytes - least_bytes
        for unit in blocks:
            if self.n_bytes[unit] <= left:
                left -= self.n_bytes[unit]
            else:
                self.passing.append(unit)
                # What comes behind stays out too: blocks are read in their order in the file.
                left = -1
        self.staying -= set(self.passing)
        staying_bytes = sum(self.n_bytes[unit] for unit in self.staying)
        self.window_bytes = budget_bytes - staying_bytes


def divide(modules: Mapping[str, nn.Module], plan: LoadPlan, units: Units, budget_bytes: int) -> Division:
    """Divide a plan's rows by unit, and say which units stay.

    Args:
        modules: every module of the model by name.
        plan: the plan of the load.
        units: how the model is divided.
        budget_bytes: most bytes of weights in memory.

    Raises:
        OptionError: the budget is less than what must be in memory at one time.
    """
    rows: dict[str, list[Row]] = {}
    for row in plan.all_rows:
        rows.setdefault(units.of_tensor(row.fqn), []).append(row)
    return Division(rows, units.names, budget_bytes, routed_rows(modules, plan.all_rows))


class Budget:
    """Brings passing units in before their forward, and lets them go after it, for as long as the model lives.

    Args:
        modules: every module of the model by name, finished. Mapped rows are in place; rows that must be made are
            placeholders on meta.
        division: which units pass.
        open_file: path -> the mapped file.
        staging: how rows reach accelerators.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        division: Division,
        open_file: Callable[[str], MappedFile],
        staging: Staging,
    ) -> None:
        self._open_file = open_file
        self._staging = staging.for_blocks()
        self._order = division.passing
        self._rows = {unit: division.rows[unit] for unit in self._order}
        self._window_bytes = division.window_bytes
        self._n_bytes = division.n_bytes
        largest_bytes = max((division.n_bytes[unit] for unit in self._order), default=0)
        all_rows = chain(*division.rows.values(), *division.experts.values())
        self._files = Descriptors({extent.file for row in all_rows for extent in extents_of(row)})
        self._reader = Reader(self._files, scattered=largest_bytes < _LARGE_BLOCK_BYTES)
        self._coming: dict[str, _Coming] = {}
        weakref.finalize(self, _cancel, self._coming)
        self._made: dict[str, list[Row]] = {}
        self._prepared: dict[str, tuple[Prepared, ...]] = {}
        self._places: dict[str, list[Place]] = {}
        self._mapped: dict[str, list[_Watched]] = {}
        # Threads that may run forward at once have the weights of a unit until the last of them has left it.
        self._lock = threading.RLock()
        self._users: dict[str, list[int]] = {unit: [] for unit in self._order}
        self.n_read_bytes = 0
        mappings = FileMappings()
        for unit in self._order:
            rows = division.rows[unit]
            self._made[unit] = [row for row in rows if row.action not in _MAPPED]
            places = places_of(modules, [row.fqn for row in rows])
            self._places |= {row.fqn: places[row.fqn] for row in self._made[unit]}
            mapped = [row for row in rows if row.action in _MAPPED]
            self._mapped[unit] = [_watched(row, places[row.fqn][0], mappings) for row in mapped]
            module = modules[unit]
            module.register_forward_pre_hook(partial(self._enter, unit))
            module.register_forward_hook(partial(self._leave, unit), always_call=True)
        if division.experts:
            RoutedExperts(modules, division.experts, self._files, division.experts_bytes)
        staying = {
            unit: [extent for row in rows if row.action in _MAPPED for extent in extents_of(row)]
            for unit, rows in division.rows.items()
            if unit in division.staying
        }
        # One unit is named for each file, the first that stands on it.
        self._stood_on = {extent.file: unit for unit in reversed(staying) for extent in staying[unit]}
        self._first: Ticket | None = self._reader.read(chain(*staying.values()))
        modules[""].register_forward_pre_hook(self._begin_forward)
        self._read_ahead(0)
        _leave_reading_to_us(modules, division, open_file)

    def __reduce__(self) -> str:
        raise OptionError(
            "a model with a memory budget cannot be copied: its weights come and go", fix="load it a second time"
        )

    def _begin_forward(self, module: nn.Module, args: Any) -> None:
        """Before a forward: what stays has been read once, and no file was cut since. That would kill the process."""
        unit = "what stays in memory"
        try:
            if self._first is not None:
                self._first.wait()
            for path, unit in self._stood_on.items():  # noqa: B007 - the one that failed is named
                self._open_file(path).check()
        except Exception as error:
            raise block_error(unit, error) from error
        self._first = None

    def _enter(self, unit: str, module: nn.Module, args: Any) -> None:
        """Before the forward of a unit: its bytes are there, and those of the next are on their way."""
        with self._lock:
            try:
                coming = self._coming.pop(unit, None) or self._begin(unit)
                self._read_ahead(self._order.index(unit) + 1, self._n_bytes[unit])
                self.n_read_bytes += coming.wait()
                if not self._users[unit]:
                    self._make(unit, coming.staged)
            except Exception as error:
                self._give_up()
                raise block_error(unit, error) from error
            self._users[unit].append(threading.get_ident())

    def _leave(self, unit: str, module: nn.Module, args: Any, output: Any) -> None:
        """After the forward: its memory is free for others. Weights that someone has written to stay."""
        with self._lock:
            # Called after a failure as well, of which this thread may not have come as far as to enter.
            with suppress(ValueError):
                self._users[unit].remove(threading.get_ident())
            if not self._users[unit]:
                self._drop(unit)

    def _drop(self, unit: str) -> None:
        parts = []
        for watched in self._mapped[unit]:
            tensor = watched.tensor()
            if tensor is not None and (tensor.data_ptr(), _version(tensor)) == watched[1:3]:
                parts += watched.parts
        let_go(parts, self._files)
        for row in self._made[unit]:
            placeholder = torch.empty(row.spec.shape, dtype=_dtype(self._places[row.fqn]), device="meta")
            put(self._places[row.fqn], placeholder)

    def _make(self, unit: str, staged: Iterable[Staged]) -> None:
        """Put in place what is made for each forward: on accelerators already, or to be converted now."""
        tensors = {name: tensor for one in staged for name, tensor in one.tensors.items()}
        plan = plan_of(row for row in self._made[unit] if row.fqn not in tensors)
        tensors |= place_all(plan, self._open_file, self._staging).tensors
        for fqn, tensor in tensors.items():
            put(self._places[fqn], tensor)

    def _begin(self, unit: str) -> _Coming:
        """Begin to bring a unit. Two are under way or in use at a time: one is filled while the other computes."""
        if unit not in self._prepared:
            self._prepared[unit] = prepare_all(self._made[unit], self._staging, lambda fqn: _ONE_GROUP)
        staged = begin_all(self._prepared[unit], self._staging)
        on_devices = {name for one in staged for name in one.tensors}
        rows = (row for row in self._rows[unit] if row.fqn not in on_devices)
        return _Coming(self._reader.read(extent for row in rows for extent in extents_of(row)), staged)

    def _read_ahead(self, position: int, in_use_bytes: int = 0) -> None:
        """Begin to read the units from a position on, in a circle, as far as there is room."""
        for step in range(len(self._order)):
            unit = self._order[(position + step) % len(self._order)]
            in_use_bytes += self._n_bytes[unit]
            if in_use_bytes > self._window_bytes:
                return
            if unit not in self._coming:
                self._coming[unit] = self._begin(unit)

    def _give_up(self) -> None:
        _cancel(self._coming)
        self._coming.clear()


def _cancel(coming: Mapping[str, _Coming]) -> None:
    for one in coming.values():
        one.cancel()


def _leave_reading_to_us(
    modules: Mapping[str, nn.Module], division: Division, open_file: Callable[[str], MappedFile]
) -> None:
    """Keep the kernel from reading what is not wanted around pages that are missing."""
    routed = [row for rows in division.experts.values() for row in rows]
    rows = [row for of_unit in division.rows.values() for row in of_unit if row.action in _MAPPED] + routed
    for file in {extent.file for row in rows if isinstance(row, PlanRow) for extent in extents_of(row)}:
        open_file(file).stop_reading_around()
    for row in rows:
        if isinstance(row, FusedRow):
            owner, _, name = row.fqn.rpartition(".")
            stop_reading_around(getattr(modules[owner], name).detach())


def _watched(row: Row, place: Place, mappings: FileMappings) -> _Watched:
    module = place.module()
    assert module is not None
    tensor = getattr(module, place.name)
    return _Watched(weakref.ref(tensor), tensor.data_ptr(), _version(tensor), parts_of(row, tensor.detach(), mappings))


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; those made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _memory_bytes(row: Row) -> int:
    if isinstance(row, FusedRow):
        return row.spec.n_bytes // row.spec.dtype.itemsize * row.dtype.itemsize
    region_items = row.spec.region.n_bytes // row.spec.dtype.itemsize
    return region_items * row.dtype.itemsize


def _dtype(places: Sequence[Place]) -> torch.dtype:
    module = places[0].module()
    assert module is not None
    tensor: torch.Tensor = getattr(module, places[0].name)
    return tensor.dtype
