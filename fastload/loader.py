"""The loading pipeline: plan, place and finish, around an opened checkpoint.

`fill_module` is the one way in which weights get into a module. `load_model` calls it for any nn.Module, a model's
`from_pretrained` for an architecture built from its config.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastload.checkpoint import Checkpoint, open_checkpoint
from fastload.detaching import detach
from fastload.dtypes import to_torch
from fastload.errors import OptionError
from fastload.finishing import Initialiser, finish, incomplete, left_empty, local_part, placeholder
from fastload.options import PINNED_BYTES, LoadOptions, parse_dtype
from fastload.pauses import paused_collector
from fastload.placement.device import Staging, begin_pinning, has_staged_rows
from fastload.placement.device_map import DeviceMapArgument, lay_out, on_one_device, reject_other_devices
from fastload.placement.network import read_apart
from fastload.placement.placing import place_all
from fastload.plan.fusing import Fusion
from fastload.plan.keys import KeyRules
from fastload.plan.planning import plan_model, plan_state_dict
from fastload.plan.rows import Action, LoadPlan
from fastload.plan.sharding import parse_size
from fastload.plan.slots import Slot, describe_modules, walk_modules
from fastload.reports import LoadReport, Stopwatch
from fastload.storage.devices import Devices, device_for
from fastload.storage.mapping import MappedFile
from fastload.storage.memory import private_bytes
from fastload.streaming.arrivals import Arrivals, parse_memory_budget
from fastload.streaming.blocks import block_classes

if TYPE_CHECKING:
    from fastload.distributed.exchanging import ReadTogether
    from fastload.distributed.node import Node

__all__ = [
    "fill_module",
    "load_model",
    "load_state_dict",
    "parse_pinned_memory",
    "ranks_of_machine",
    "remember_report",
    "report",
]

_REPORTS: WeakKeyDictionary[nn.Module, LoadReport] = WeakKeyDictionary()


def load_state_dict(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    pinned_memory: int | str | None = None,
    verify: bool = False,
    **where: Any,
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by key.

    Args:
        path: a folder, one weight file, an index, or a hub id.
        device: where the tensors shall be. On the CPU they are views of the mapped files.
        dtype: type that floating point tensors are converted to; None keeps each one's own.
        pinned_memory: most host memory that is pinned to load to a CUDA device, as a number or "512MB"; None for
            268 MB. It is kept for the next load (see `free_pinned_memory`).
        verify: first compare all bytes of the files with their checksums (see `Checkpoint.verify`).
        where: which files, as for `open_checkpoint`.

    Raises:
        IntegrityError: with ``verify``, bytes are not those that were written.
    """
    options = LoadOptions(dtype=parse_dtype(dtype), pinned_bytes=parse_pinned_memory(pinned_memory))
    with paused_collector():
        return _state_dict(path, options, device, verify, where)


def _state_dict(
    path: str | os.PathLike[str],
    options: LoadOptions,
    device: str | torch.device,
    verify: bool,
    where: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    # A function of its own, so that specs and plan are gone when the collector resumes, and it need not walk them.
    checkpoint = open_checkpoint(path, **where)
    staging = Staging(device_for, options.pinned_bytes, path_of=checkpoint.held_path)
    begin_pinning([str(device)], lambda: checkpoint.n_bytes, staging)
    if verify:
        checkpoint.verify()
    plan = plan_state_dict(checkpoint.specs, dtype=options.dtype, device=str(device), fused=checkpoint.fused)
    beside_a_device = has_staged_rows(plan, staging)
    if not beside_a_device:
        checkpoint.read_ahead(in_file_order=True)
    tensors = place_all(*read_apart(plan, checkpoint, beside_a_device=beside_a_device), staging).tensors
    if any(key != placed for key, placed in zip(checkpoint, tensors, strict=True)):
        tensors = {key: tensors[key] for key in checkpoint}
    return tensors | {dropped: tensors[kept] for dropped, kept in checkpoint.aliases.items()}


def load_model(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    device_map: DeviceMapArgument = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: str | torch.dtype | None = None,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    fusions: Sequence[Fusion] = (),
    detached: bool = False,
    lazy: bool = False,
    stream: bool = False,
    memory_budget: int | str | None = None,
    pinned_memory: int | str | None = None,
    dedup: str | None = None,
    verify: bool = False,
    **where: Any,
) -> LoadReport:
    """Fill any module from a checkpoint.

    A parameter on the meta device becomes a view of the mapped file (or a tensor on ``device``); one that has memory
    keeps it and is overwritten in place, so that optimisers and hooks that hold it stay right. Of a DTensor (after
    `parallelize_module`, `fully_shard`, or both) each rank reads and makes its own part; ranks do not wait for each
    other.

    Args:
        module: the module, built on meta or for real.
        path: a folder, one weight file, an index, or a hub id.
        device: where parameters on meta shall be made; None for the CPU, or for this rank's device of the mesh where
            parameters are DTensors.
        device_map: in place of ``device``: a device, a strategy ("auto", "balanced", "balanced_low_0", "sequential"),
            or module name -> device, for a module on meta. What is on "cpu" or "disk" beside an accelerator computes
            on the first one, and is brought there for each forward, a block while the one before computes.
        max_memory: device -> limit for the strategies, such as ``{0: "10GB", "cpu": "4GB"}``.
        dtype: type for floating point parameters on meta; None for the one the module was built with.
        strict: raise KeyMatchError on any missing, unexpected or mismatched key, before anything is changed.
        ignore_mismatched_sizes: leave parameters alone whose shape differs (they must have memory).
        key_mapping: regular expression -> replacement for the files' keys.
        fusions: tensors of the module that the files keep in pieces, such as the experts of a layer.
        detached: copy what would stand on the mapped files, so that they may be rewritten in place (see `detach`).
        lazy: bring the weights of a block when it is first used.
        stream: bring them in the background, in the order of use, while the first forward may begin.
        memory_budget: most bytes of weights to keep in memory, as a number or "4GB"; blocks beyond it are read for
            each forward, while the block before computes.
        pinned_memory: most host memory that is pinned to load to a CUDA device, as for `load_state_dict`.
        dedup: "node" to have the ranks of a machine read cold files for each other: each byte that several of them
            need is read by one and handed over, as are parts side by side whose rows are short. All ranks of the
            machine must load the same checkpoint, at the same time. The default, None, has each rank read its own
            part, and waits for nobody; it is right wherever the ranks share a page cache: that reads a byte once for
            all who map it, and they share its memory too. "node" is for where they do not: mounts of their own or
            without a cache, a checkpoint that is larger than memory, storage that is slow with short rows.
        verify: first compare all bytes of the files with their checksums (see `Checkpoint.verify`).
        where: which files, as for `open_checkpoint`.

    Raises:
        KeyMatchError: the keys do not fit.
        RankError: with ``dedup``, another rank of the machine failed, or is gone.
        IntegrityError: with ``verify``, bytes are not those that were written.
        IncompleteModelError: something would be left on meta.
    """
    clock = Stopwatch()
    home = _mesh_device(module)
    layout = on_one_device(device or home or "cpu", memory_budget)
    if device_map is not None or max_memory is not None:
        reject_other_devices(module, device, home)
        layout = lay_out(module, device_map, max_memory, dtype, memory_budget, block_classes(walk_modules(module)))
    options = LoadOptions(
        dtype=parse_dtype(dtype),
        device_map=layout.placed_on,
        is_dispatched=layout.is_dispatched,
        strict=strict,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        key_mapping=key_mapping,
        detached=detached,
        lazy=lazy,
        stream=stream,
        memory_budget_bytes=parse_memory_budget(layout.memory_budget),
        pinned_bytes=parse_pinned_memory(pinned_memory),
        dedup=dedup,
    )
    with paused_collector(), ranks_of_machine(options) as node:
        with clock("open"):
            checkpoint = open_checkpoint(path, **where)
            begin_pinning(
                options.device_map.values(), lambda: checkpoint.n_bytes, Staging(device_for, options.pinned_bytes)
            )
            if layout.memory_budget is None and home is None and node is None:
                checkpoint.read_ahead()
        if verify:
            with clock("verify"):
                checkpoint.verify()
        rules = KeyRules(fusions=tuple(fusions))
        result = fill_module(module, checkpoint, options, source=os.fspath(path), clock=clock, rules=rules, node=node)
    if device_map is not None:
        module.hf_device_map = layout.devices  # type: ignore[assignment]
    return result


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


def parse_pinned_memory(pinned_memory: int | str | None) -> int:
    """Bytes of a limit of pinned memory: a number or "512MB"; None for the usual. OptionError if it is neither."""
    return PINNED_BYTES if pinned_memory is None else parse_size(pinned_memory, "pinned_memory")


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
    """Plan, place and finish. Nothing of the module is changed before the plan has been accepted."""
    if options.dedup is not None and node is None:
        with ranks_of_machine(options) as node:
            return fill_module(
                module,
                checkpoint,
                options,
                source=source,
                clock=clock,
                rules=rules,
                initialise=initialise,
                devices=devices,
                node=node,
            )
    staging = Staging(devices, options.pinned_bytes, path_of=checkpoint.held_path)
    before_bytes = private_bytes()
    rules = rules or KeyRules()
    with clock("plan"):
        modules = walk_modules(module)
        slots = _with_boxes(describe_modules(modules), modules, options)
        plan = plan_model(
            checkpoint.specs, slots, options, rules, source, fused=checkpoint.fused, others=checkpoint.others
        )
        is_part = any(slot.box for slot in slots.values())
        empty = left_empty(plan, slots)
        if initialise is None and empty:
            raise incomplete("the files do not have these parameters, and the module has no values for them", empty)
        arrivals = Arrivals(modules, plan, options, {fqn: slot.tied_to for fqn, slot in slots.items()}, staging)
    with clock("place"):
        existing = (
            _memory_of(module, slots) if any(not slot.on_meta and slot.persistent for slot in slots.values()) else {}
        )
        whole = plan
        shared = None if node is None else _read_together(node, plan, checkpoint, existing)
        if shared is not None:
            whole, plan = shared.plan, shared.left
        if is_part or node is not None:
            # What lies between is another rank's, and not read ahead.
            in_one_run = [row.spec for row in plan.rows if row.action is not Action.SLICE]
            checkpoint.read_ahead(in_one_run, nothing_between=True)
        open_file: Callable[[str], MappedFile] = checkpoint.open_file
        if arrivals.reads_all:
            beside_a_device = has_staged_rows(plan, staging)
            plan, open_file = read_apart(plan, checkpoint, beside_a_device=beside_a_device)
        now, later = arrivals.split(plan)
        placed = place_all(now, open_file, staging, existing, title=os.path.basename(source) or source)
        # What is still to come is tied and finished with what stands for it.
        tensors = placed.tensors | {
            row.fqn: placeholder(modules, row.fqn, to_torch(row.dtype)) for row in later.all_rows
        }
        tensors |= shared.tensors if shared else {}
        n_remapped_bytes = placed.n_remapped_bytes
        n_remapped_bytes += sum(row.spec.n_bytes for row in later.fused if row.action is Action.REMAP)
    with clock("finish"):
        notes = [*checkpoint.notes, *placed.notes, *([shared.note] if shared else [])]
        notes += finish(modules, slots, whole, tensors, empty, options, rules, initialise)
        notes += arrivals.begin(module, open_file)
    bytes_by_action = plan.bytes_by_outcome(n_remapped_bytes) | (shared.bytes_by_action if shared else {})
    n_bytes = sum(bytes_by_action.values())
    # Only a rank's parts, and what is compressed, are not read as they are.
    is_as_it_is = not is_part and shared is None and checkpoint.format == "safetensors"
    n_read_bytes = n_bytes if is_as_it_is else plan.asked_bytes() + (shared.n_read_bytes if shared else 0)
    if options.detached:
        with clock("detach"):
            detach(module)
        bytes_by_action = _all_copied(bytes_by_action)
    after_bytes = private_bytes()
    result = LoadReport(
        source=source,
        files=checkpoint.files,
        format=checkpoint.format,
        n_tensors=len(whole.rows) + sum(len(row.spec.pieces) for row in whole.fused),
        n_bytes=n_bytes,
        n_read_bytes=n_read_bytes,
        bytes_by_action=bytes_by_action,
        stages_ms=clock.stages_ms,
        private_bytes=None if before_bytes is None or after_bytes is None else after_bytes - before_bytes,
        missing_keys=whole.keys.missing,
        unexpected_keys=whole.keys.unexpected,
        mismatched_keys=whole.mismatched,
        ignored_keys=whole.keys.ignored,
        initialised_keys=tuple(empty),
        notes=tuple(notes),
    )
    remember_report(module, result)
    return result


def _read_together(
    node: Node, plan: LoadPlan, checkpoint: Checkpoint, existing: Mapping[str, torch.Tensor]
) -> ReadTogether:
    from fastload.distributed.exchanging import read_together

    return read_together(node, plan, checkpoint, existing)


def _mesh_device(module: nn.Module) -> str | None:
    """Where the parts of a module's DTensors belong; None if it has none."""
    if "torch.distributed.tensor" not in sys.modules:
        return None  # nobody can have made one
    from fastload.distributed.layouts import mesh_device

    return mesh_device(walk_modules(module))


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
