"""Weights that arrive after the load has returned: when a block is first used, or one block after another meanwhile.

Until then parameters lie on meta. Every module of a unit has a hook that waits for the unit before its forward; when
the unit is there its hooks are gone, and when all are there the model is as any other. A thread that brings blocks
holds nothing of the model while it waits for nothing: it ends with the model, between two blocks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastload.errors import BlockError, OptionError
from fastload.placement.cpu import place
from fastload.placement.fused import place_fused
from fastload.placement.modules import give
from fastload.plan.keys import KeyMatch
from fastload.plan.rows import FusedRow, LoadPlan, PlanRow
from fastload.storage.mapping import MappedFile
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
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        plan: LoadPlan,
        open_file: Callable[[str], MappedFile],
        units: Units,
    ) -> None:
        self._open_file = open_file
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

    def bring(self, unit: str) -> None:
        """Have a unit in place, by this thread unless another is at it. Nothing happens if it is there.

        Raises:
            BlockError: it could not be read; also for every unit after it.
        """
        with self._locks[unit]:
            rows = self._rows.get(unit)
            if rows is None:
                return
            if self._error is not None:
                raise self._error
            try:
                plan = plan_of(rows)
                for path in {extent.file for row in rows for extent in extents_of(row)}:
                    self._open_file(path).check()
                # What is made in inference mode could never be trained.
                with torch.inference_mode(False):
                    tensors = place(plan, self._open_file, title=unit or "loading")
                    tensors |= place_fused(plan, self._open_file, {})[0]
            except Exception as error:
                self._error = block_error(unit, error)
                raise self._error from error
            with torch.inference_mode(False):
                for fqn, tensor in tensors.items():
                    put(self._places[fqn], tensor)
            del self._rows[unit]
            for handle in self._handles.pop(unit):
                handle.remove()

    def bring_all(self) -> None:
        """Have everything in place. Raises as `bring`."""
        for unit in self._units:
            self.bring(unit)

    def bring_in_background(self) -> None:
        """Bring one unit after the other on a thread of its own. What goes wrong is raised by who needs the unit."""
        threading.Thread(target=_run, args=(weakref.ref(self),), name="fastload-stream", daemon=True).start()

    def _arrive(self, unit: str, module: nn.Module, args: Any) -> None:
        self.bring(unit)


def _run(reference: weakref.ref[Deferred]) -> None:
    deferred = reference()
    units = [] if deferred is None else list(deferred._units)
    del deferred
    for unit in units:
        deferred = reference()
        if deferred is None:
            return
        try:
            deferred.bring(unit)
        except BlockError:
            return
        del deferred


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
