"""Weights that arrive after the load has returned: when a block is first used, or one block after another meanwhile.

Until then parameters lie on meta. Every module of a unit has a hook that waits for the unit before its forward; when
the unit is there its hooks are gone, and when all are there the model is as any other. A thread that brings blocks
holds nothing of the model while it waits for nothing: it ends with the model, between two blocks.

What is streamed to an accelerator is under way from the start, block by block: a forward waits until the copies of its
block are enqueued, and has the accelerator wait for them, as PipeSwitch does (Bai and others, OSDI 2020).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastload.errors import BlockError, OptionError
from fastload.placement.device import Staged, Staging, stage_all
from fastload.placement.modules import give
from fastload.placement.placing import place_all
from fastload.plan.keys import KeyMatch
from fastload.plan.rows import FusedRow, LoadPlan, PlanRow
from fastload.storage.mapping import MappedFile
from fastload.storage.staging import Transfer
from fastload.streaming.blocks import Units, block_error
from fastload.streaming.pages import extents_of

__all__ = ["Deferred", "Place", "places_of", "plan_of", "put"]


class Place(NamedTuple):
    """One name under which a module holds a tensor."""

    module: weakref.ref[nn.Module]
    name: str


class Deferred:
    """What of a plan is still to come.

    Args:
        modules: every module of the model by name, finished: ties are tied.
        plan: the rows to come.
        open_file: path -> the mapped file.
        units: how the model is divided.
        staging: how rows reach accelerators.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        plan: LoadPlan,
        open_file: Callable[[str], MappedFile],
        units: Units,
        staging: Staging,
    ) -> None:
        self._open_file = open_file
        self._staging = staging
        self._staged: tuple[Staged, ...] = ()
        self._places = places_of(modules, [row.fqn for row in plan.all_rows])
        self._rows: dict[str, list[PlanRow | FusedRow]] = {}
        for row in plan.all_rows:
            self._rows.setdefault(units.of_tensor(row.fqn), []).append(row)
        self._units = [unit for unit in units.names if unit in self._rows]
        self._locks = {unit: threading.Lock() for unit in self._units}
        self._handles: dict[str, list[RemovableHandle]] = {unit: [] for unit in self._units}
        self._error: BaseException | None = None
        for name, module in modules.items():
            unit = units.of_module[name]
            if unit in self._locks:
                handle = module.register_forward_pre_hook(partial(self._arrive, unit))
                self._handles[unit].append(handle)

    def __reduce__(self) -> str:
        raise OptionError(
            "a model cannot be copied while weights of it are still to come", fix="call fastload.wait(model) first"
        )

    def bring(self, unit: str, *, in_forward: bool = False) -> None:
        """Have a unit in place, by this thread unless another is at it. Nothing happens if it is there.

        Args:
            unit: which.
            in_forward: what is on its way to an accelerator need not be there yet: the accelerator will wait.

        Raises:
            BlockError: it could not be read; also for every unit after it.
        """
        with self._locks[unit]:
            if unit not in self._handles:
                return
            if self._error is not None:
                raise self._error
            try:
                for staged in self._staged:
                    (staged.transfer.hold_back if in_forward else staged.transfer.wait)(self._units.index(unit))
                if unit in self._rows:
                    self._put(unit)
            except Exception as error:
                self._error = block_error(unit, error)
                raise self._error from error
            if not in_forward or not self._staged:
                # Until copies are done, every stream that comes by has to be told to wait for them.
                for handle in self._handles.pop(unit):
                    handle.remove()

    def bring_all(self) -> None:
        """Have everything in place. Raises as `bring`."""
        for unit in self._units:
            self.bring(unit)

    def bring_in_background(self) -> tuple[str, ...]:
        """Bring one unit after the other on threads. What goes wrong is raised by who needs the unit.

        Returns:
            A note on each accelerator's transfer.

        Raises:
            DeviceMemoryError: an accelerator has too little memory.
        """
        numbers = {row.fqn: number for number, unit in enumerate(self._units) for row in self._rows[unit]}
        rows = [row for of_unit in self._rows.values() for row in of_unit]
        self._staged = stage_all(rows, self._staging, numbers.__getitem__)
        transfers = [staged.transfer for staged in self._staged]
        weakref.finalize(self, _cancel, transfers)
        threading.Thread(target=_run, args=(weakref.ref(self), transfers), name="fastload-stream", daemon=True).start()
        return tuple(transfer.note for transfer in transfers)

    def _put(self, unit: str) -> None:
        rows = self._rows[unit]
        staged = {name: tensor for one in self._staged for name, tensor in one.tensors.items()}
        plan = plan_of(row for row in rows if row.fqn not in staged)
        for path in {extent.file for row in plan.all_rows for extent in extents_of(row)}:
            self._open_file(path).check()
        # What is made in inference mode could never be trained.
        with torch.inference_mode(False):
            tensors = place_all(plan, self._open_file, self._staging, title=unit or "loading").tensors
            for row in rows:
                put(self._places[row.fqn], staged[row.fqn] if row.fqn in staged else tensors[row.fqn])
        del self._rows[unit]

    def _arrive(self, unit: str, module: nn.Module, args: Any) -> None:
        self.bring(unit, in_forward=True)


def _run(reference: weakref.ref[Deferred], transfers: Sequence[Transfer]) -> None:
    deferred = reference()
    units = [] if deferred is None else list(deferred._units)
    del deferred
    for number, unit in enumerate(units):
        # The model is not held meanwhile. What goes wrong here is met again, and told, below.
        with suppress(Exception):
            for transfer in transfers:
                transfer.wait(number)
        deferred = reference()
        if deferred is None:
            return
        try:
            deferred.bring(unit)
        except BlockError:
            return
        del deferred


def _cancel(transfers: Sequence[Transfer]) -> None:
    for transfer in transfers:
        transfer.cancel()


def plan_of(rows: Iterable[PlanRow | FusedRow]) -> LoadPlan:
    """A plan of some rows of another."""
    rows = list(rows)
    single = tuple(row for row in rows if isinstance(row, PlanRow))
    fused = tuple(row for row in rows if isinstance(row, FusedRow))
    return LoadPlan(single, KeyMatch({}, (), (), ()), (), fused)


def places_of(modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, list[Place]]:
    """Every place where a model holds the tensor of a name: several, if it is tied."""
    holders: dict[int, list[Place]] = {}
    seen: set[int] = set()
    for module in modules.values():
        if id(module) in seen:
            continue
        seen.add(id(module))
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    holders.setdefault(id(tensor), []).append(Place(weakref.ref(module), name))
    return {fqn: holders[id(_tensor(modules, fqn))] for fqn in names}


def put(places: Iterable[Place], tensor: torch.Tensor) -> None:
    """Give a tensor to every place, as the kind of object that is there: one parameter for all of them, or a buffer."""
    new: torch.Tensor | None = None
    for reference, name in places:
        module = reference()
        if module is None:
            continue
        if new is None:
            new, old = tensor, module._parameters.get(name)
            if old is not None:
                new = nn.Parameter(tensor, old.requires_grad and (tensor.is_floating_point() or tensor.is_complex()))
                new.__dict__.update(old.__dict__)
        give(module, name, new)


def _tensor(modules: Mapping[str, nn.Module], fqn: str) -> torch.Tensor | None:
    prefix, _, name = fqn.rpartition(".")
    module = modules[prefix]
    return module._parameters[name] if name in module._parameters else module._buffers[name]
