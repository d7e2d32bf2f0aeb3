"""The loading pipeline: plan, place and finish, around an opened checkpoint.

`fill_module` is the one way in which weights get into a module: `load_model` calls it for any nn.Module, a model's
`from_pretrained` for an architecture built from its config.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastload.checkpoint import Checkpoint
from fastload.detaching import detach
from fastload.dtypes import to_torch
from fastload.errors import OptionError
from fastload.finishing import Initialiser, finish, incomplete, left_empty, local_part, placeholder
from fastload.options import LoadOptions
from fastload.placement.device import Staging, has_staged_rows
from fastload.placement.network import read_apart
from fastload.placement.placing import place_all
from fastload.placement.slices import use_where_they_lie
from fastload.plan.keys import KeyRules
from fastload.plan.planning import plan_model
from fastload.plan.rows import Action, LoadPlan
from fastload.plan.slots import Slot, describe_modules, walk_modules
from fastload.reports import LoadReport, Stopwatch
from fastload.storage.devices import Devices, device_for
from fastload.storage.mapping import MappedFile
from fastload.storage.memory import private_bytes
from fastload.streaming.arrivals import Arrivals

if TYPE_CHECKING:
    from fastload.distributed.exchanging import ReadTogether
    from fastload.distributed.node import Node

__all__ = ["fill_module", "ranks_of_machine", "remember_report", "report", "with_views"]

_REPORTS: WeakKeyDictionary[nn.Module, LoadReport] = WeakKeyDictionary()


def fill_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    options: LoadOptions,
    *,
    source: str,
    clock: Stopwatch,
    rules: KeyRules | None = None,
    initialise: Initialiser | None = None,
    devices: Devices = device_for,
    node: Node | None = None,
) -> LoadReport:
    """Plan, place and finish. Nothing of the module is changed before the plan has been accepted.

    Args:
        module: the module.
        checkpoint: where the weights are.
        options: what the caller asked for.
        source: the checkpoint's path, for messages and the report.
        clock: takes the time of the stages.
        rules: what the architecture knows of its keys.
        initialise: gives parameters that no file has their first values; None where there must be none.
        devices: name -> the accelerator that staging reaches.
        node: the ranks that read for each other, where that is asked for (see `ranks_of_machine`).
    """
    staging = Staging(devices, options.pinned_bytes, path_of=checkpoint.held_path)
    before_bytes = private_bytes()
    rules = rules or KeyRules()
    with clock("plan"):
        modules = walk_modules(module)
        slots = _with_boxes(describe_modules(modules), modules, options)
        specs, fused = checkpoint.specs, checkpoint.fused
        plan = plan_model(specs, slots, options, rules, source, fused=fused, others=checkpoint.others)
        empty = left_empty(plan, slots)
        if initialise is None and empty:
            raise incomplete("the files do not have these parameters, and the module has no values for them", empty)
        arrivals = Arrivals(modules, plan, options, {fqn: slot.tied_to for fqn, slot in slots.items()}, staging)
    with clock("place"):
        placed = _place(module, modules, slots, plan, checkpoint, arrivals, staging, node, options, source)
    with clock("finish"):
        notes = [*checkpoint.notes, *placed.notes]
        notes += finish(modules, slots, placed.plan, placed.tensors, empty, options, rules, initialise)
        notes += arrivals.begin(module, placed.open_file)
    bytes_by_action = placed.bytes_by_action
    if options.detached:
        with clock("detach"):
            detach(module)
        bytes_by_action = _all_copied(bytes_by_action)
    after_bytes = private_bytes()
    result = LoadReport(
        source=source,
        files=checkpoint.files,
        format=checkpoint.format,
        n_tensors=len(placed.plan.rows) + sum(len(row.spec.pieces) for row in placed.plan.fused),
        n_bytes=sum(bytes_by_action.values()),
        n_read_bytes=placed.n_read_bytes,
        bytes_by_action=bytes_by_action,
        stages_ms=clock.stages_ms,
        private_bytes=None if before_bytes is None or after_bytes is None else after_bytes - before_bytes,
        missing_keys=plan.keys.missing,
        unexpected_keys=plan.keys.unexpected,
        mismatched_keys=plan.mismatched,
        ignored_keys=plan.keys.ignored,
        initialised_keys=tuple(empty),
        notes=tuple(notes),
    )
    remember_report(module, result)
    return result


class _Placed(NamedTuple):
    """What placing a module's plan came to.

    Attributes:
        plan: what was done, with what ranks read for each other.
        tensors: by name; for those that come later, what stands for them.
        open_file: the way to open the files.
        bytes_by_action: bytes in the files by what was done with them.
        n_read_bytes: bytes that were asked of the files.
        notes: choices that were made.
    """

    plan: LoadPlan
    tensors: dict[str, torch.Tensor]
    open_file: Callable[[str], MappedFile]
    bytes_by_action: dict[str, int]
    n_read_bytes: int
    notes: tuple[str, ...]


def _place(
    module: nn.Module,
    modules: Mapping[str, nn.Module],
    slots: Mapping[str, Slot],
    plan: LoadPlan,
    checkpoint: Checkpoint,
    arrivals: Arrivals,
    staging: Staging,
    node: Node | None,
    options: LoadOptions,
    source: str,
) -> _Placed:
    """The tensors of a module: what ranks read for each other, then what is this process's own."""
    has_memory = any(not slot.on_meta and slot.persistent for slot in slots.values())
    existing = _memory_of(module, slots) if has_memory else {}
    shared = None if node is None else _read_together(node, plan, checkpoint, existing)
    own = plan if shared is None else shared.left
    is_part = any(slot.box for slot in slots.values())
    if is_part and not options.detached:
        own = with_views(own, modules, checkpoint)
    if is_part or node is not None:
        # What lies between is another rank's, and not read ahead.
        in_one_run = [row.spec for row in own.rows if row.action not in (Action.SLICE, Action.STRIDE)]
        checkpoint.read_ahead(in_one_run, nothing_between=True)
    open_file: Callable[[str], MappedFile] = checkpoint.open_file
    if arrivals.reads_all:
        own, open_file = read_apart(own, checkpoint, beside_a_device=has_staged_rows(own, staging))
    now, later = arrivals.split(own)
    placed = place_all(now, open_file, staging, existing, title=os.path.basename(source) or source)
    # What is still to come is tied and finished with what stands for it.
    to_come = {row.fqn: placeholder(modules, row.fqn, to_torch(row.dtype)) for row in later.all_rows}
    n_remapped_bytes = placed.n_remapped_bytes
    n_remapped_bytes += sum(row.spec.n_bytes for row in later.fused if row.action is Action.REMAP)
    bytes_by_action = own.bytes_by_outcome(n_remapped_bytes)
    if shared is None:
        # Only a rank's parts, and what is compressed, are not read as they are.
        is_as_it_is = not is_part and checkpoint.format == "safetensors"
        n_read_bytes = sum(bytes_by_action.values()) if is_as_it_is else own.asked_bytes()
        return _Placed(own, placed.tensors | to_come, open_file, bytes_by_action, n_read_bytes, placed.notes)
    return _Placed(
        shared.plan,
        placed.tensors | to_come | shared.tensors,
        open_file,
        bytes_by_action | shared.bytes_by_action,
        own.asked_bytes() + shared.n_read_bytes,
        (*placed.notes, shared.note),
    )


@contextmanager
def ranks_of_machine(options: LoadOptions) -> Iterator[Node | None]:
    """The ranks that options have read for each other, for `fill_module`; None if they read for themselves.

    A load that fails in here before it comes to them tells them, so that they do not wait.
    """
    if options.dedup is None:
        yield None
        return
    from fastload.distributed.node import join_node

    node = join_node(options.device_map.get(""))
    with node.failing_together():
        yield node


def report(model: nn.Module) -> LoadReport:
    """The report of the load that filled a model; OptionError if fastload did not load it."""
    try:
        return _REPORTS[model]
    except KeyError:
        raise OptionError(
            "this module was not loaded by fastload in this process", found=type(model).__name__
        ) from None


def remember_report(model: nn.Module, report: LoadReport) -> None:
    """Have `report` give this one, for as long as the model lives."""
    _REPORTS[model] = report


def with_views(plan: LoadPlan, modules: Mapping[str, nn.Module], checkpoint: Checkpoint) -> LoadPlan:
    """The plan for a rank's parts, with views of warm files where nobody minds their strides."""
    from fastload.distributed.layouts import may_have_strides

    return use_where_they_lie(plan, checkpoint) if may_have_strides(modules) else plan


def _read_together(
    node: Node, plan: LoadPlan, checkpoint: Checkpoint, existing: Mapping[str, torch.Tensor]
) -> ReadTogether:
    from fastload.distributed.exchanging import read_together

    return read_together(node, plan, checkpoint, existing)


def _with_boxes(slots: dict[str, Slot], modules: Mapping[str, nn.Module], options: LoadOptions) -> dict[str, Slot]:
    """The slots, those of DTensors with the part that this rank owns."""
    if "torch.distributed.tensor" not in sys.modules:
        return slots
    from fastload.distributed.layouts import boxes_of

    boxes = boxes_of(modules)
    if boxes and (options.is_deferred or options.memory_budget_bytes is not None):
        raise OptionError(
            "what is laid out over ranks cannot arrive later",
            key=next(iter(boxes)),
            found="stream, lazy or a memory_budget for a module with DTensors",
            fix="leave out these options",
        )
    return {fqn: slot._replace(box=boxes.get(fqn)) for fqn, slot in slots.items()} if boxes else slots


def _all_copied(counts: dict[str, int]) -> dict[str, int]:
    """Source bytes by what was done, after what stood on the files was given memory of its own."""
    n_mapped_bytes = counts.pop(Action.MAP.value, 0) + counts.pop(Action.REMAP.value, 0)
    return {Action.COPY.value: counts.pop(Action.COPY.value, 0) + n_mapped_bytes, **counts}


def _memory_of(module: nn.Module, slots: Mapping[str, Slot]) -> dict[str, torch.Tensor]:
    """The memory that a module has, by name: its tensors, of DTensors the part that is here."""
    tensors = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {fqn: local_part(tensor, slots.get(fqn)) for fqn, tensor in tensors}
