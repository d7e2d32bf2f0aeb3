"""When the weights of a load arrive: now, later, or for each forward anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from fastload.errors import OptionError
from fastload.options import LoadOptions
from fastload.placement.device import Staging
from fastload.plan.rows import Action, LoadPlan
from fastload.plan.sharding import parse_size
from fastload.storage.mapping import MappedFile
from fastload.storage.memory import available_bytes
from fastload.streaming.blocks import find_units
from fastload.streaming.budget import Budget, Division, divide
from fastload.streaming.deferring import Deferred
from fastload.streaming.passing import install_hooks, names_passing

__all__ = ["Arrivals", "parse_memory_budget", "wait"]

_DEFERRED: WeakKeyDictionary[nn.Module, Deferred] = WeakKeyDictionary()
_MAPPED = (Action.MAP, Action.REMAP)


def wait(model: nn.Module) -> None:
    """Have all weights of a model in place that was loaded with ``stream=True`` or ``lazy=True``.

    Afterwards it is as any other model. Returns at once where nothing is to come.

    Raises:
        BlockError: some could not be read.
    """
    deferred = _DEFERRED.get(model)
    if deferred is not None:
        deferred.bring_all()
        del _DEFERRED[model]


def parse_memory_budget(budget: int | str | None) -> int | None:
    """Bytes of a budget: a number, "4GB", or "auto" for four fifths of what is free. None stays None.

    Raises:
        OptionError: it is none of these.
    """
    if budget != "auto":
        return None if budget is None else parse_size(budget, "memory_budget")
    free_bytes = available_bytes()
    if free_bytes is None:
        raise OptionError("this platform does not say how much memory is free", fix="name the memory_budget in bytes")
    return free_bytes * 4 // 5


class Arrivals:
    """The decisions of one load.

    Args:
        modules: every module of the model by name.
        plan: the plan of the load.
        options: what the caller asked for.
        tied: name -> the first name of the same parameter.
        staging: how rows reach accelerators.

    Raises:
        OptionError: the memory budget is smaller than what must be in memory at one time; weights for several devices
            are to arrive later.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        plan: LoadPlan,
        options: LoadOptions,
        tied: Mapping[str, str | None],
        staging: Staging,
    ) -> None:
        self._modules = modules
        self._options = options
        self._later = LoadPlan((), plan.keys)
        self._division: Division | None = None
        self._staging = staging
        self._passing: frozenset[str] = frozenset()
        # Names of one parameter that the files have several times must be compared, and so be there.
        n_rows = Counter(tied.get(row.fqn) or row.fqn for row in plan.all_rows)
        self._compared = {fqn for fqn in tied if n_rows[tied.get(fqn) or fqn] > 1}
        if options.is_dispatched:
            self._passing = names_passing(modules, plan, options.device_map, tied, staging) - self._compared
        if not options.is_deferred and options.memory_budget_bytes is None:
            return
        devices = {row.device for row in plan.all_rows if row.device}
        if options.is_deferred and len(devices) > 1:
            raise OptionError(
                "what is laid out over several devices cannot arrive later",
                expected="one device with stream or lazy",
                found=", ".join(sorted(devices)),
                fix="leave out stream and lazy, or name one device",
            )
        self._units = find_units(modules)
        held = ((prefix, name) for prefix, module in modules.items() for name in module._parameters)
        names = (f"{prefix}.{name}" if prefix else name for prefix, name in held)
        first = next(names, "")
        # What a model says of its device and type is what its first parameter says: this one is there from the start.
        self._first = {row.fqn for row in plan.all_rows if first in (row.fqn, tied.get(row.fqn))}
        if options.memory_budget_bytes is not None:
            self._division = divide(modules, plan, self._units, options.memory_budget_bytes)

    @property
    def reads_all(self) -> bool:
        """Whether the load may have all weights in memory at one time, as those of network files that it reads."""
        return self._division is None and not self._passing

    def split(self, plan: LoadPlan) -> tuple[LoadPlan, LoadPlan]:
        """The part of a plan that is placed by the load, and the part that arrives afterwards."""
        if self._options.is_deferred:
            later = {row.fqn for row in plan.all_rows if row.action is not Action.FILL} - self._first
        elif self._division is not None:
            rows = [row for unit in self._division.passing for row in self._division.rows[unit]]
            later = {row.fqn for row in rows if row.action not in _MAPPED}
        elif self._passing:
            later = set(self._passing)
        else:
            return plan, self._later
        later -= self._compared
        # A fused row into memory that is there has no device of its own.
        later -= {row.fqn for row in plan.fused if not row.device}
        parts = [
            replace(
                plan,
                rows=tuple(row for row in plan.rows if (row.fqn in later) is is_later),
                fused=tuple(row for row in plan.fused if (row.fqn in later) is is_later),
            )
            for is_later in (False, True)
        ]
        self._later = parts[1]
        return parts[0], parts[1]

    def begin(self, model: nn.Module, open_file: Callable[[str], MappedFile]) -> tuple[str, ...]:
        """Let the later part arrive; the model is finished but for it. Returns notes on how."""
        if self._options.is_dispatched:
            return install_hooks(model, self._options.device_map, self._later, open_file, self._staging)
        if self._division is not None:
            if self._division.passing or self._division.experts:
                Budget(self._modules, self._division, open_file, self._staging)
        elif self._options.is_deferred:
            deferred = Deferred(self._modules, self._later, open_file, self._units, self._staging)
            notes = deferred.bring_in_background() if self._options.stream else ()
            _DEFERRED[model] = deferred
            return notes
        return ()
