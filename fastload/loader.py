"""The loading pipeline: plan, place and finish, around an opened checkpoint.

`fill_module` is the one way in which weights get into a module. `load_model` calls it for any nn.Module, a model's
`from_pretrained` for an architecture built from its config.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastload.checkpoint import Checkpoint, open_checkpoint
from fastload.detaching import detach
from fastload.dtypes import to_torch
from fastload.errors import IncompleteModelError, OptionError
from fastload.options import PINNED_BYTES, LoadOptions, parse_dtype
from fastload.pauses import paused_collector
from fastload.placement.device import Staging, begin_pinning, has_staged_rows
from fastload.placement.modules import give
from fastload.placement.network import read_apart
from fastload.placement.placing import place_all
from fastload.plan.fusing import Fusion
from fastload.plan.keys import KeyRules
from fastload.plan.planning import device_finder, plan_model, plan_state_dict, target_dtype
from fastload.plan.rows import Action, LoadPlan
from fastload.plan.sharding import parse_size
from fastload.plan.slots import Slot, describe_modules, walk_modules
from fastload.reports import LoadReport, Stopwatch, collapse_keys
from fastload.storage.devices import Devices, device_for
from fastload.storage.mapping import MappedFile
from fastload.storage.memory import private_bytes
from fastload.streaming.arrivals import Arrivals, parse_memory_budget

__all__ = [
    "Initialiser",
    "fill_module",
    "load_model",
    "load_state_dict",
    "parse_pinned_memory",
    "remember_report",
    "report",
]

Initialiser = Callable[[nn.Module, str, torch.Tensor], None]
"""Gives one parameter of one module its random first values: (owner, name in the owner, tensor)."""

# Most attributes of a module are of these types; looking at the type alone is what makes the audit cheap.
_PLAIN_TYPES = frozenset({bool, dict, float, int, list, NoneType, OrderedDict, set, str, tuple})
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
    begin_pinning([str(device)], checkpoint.n_bytes, staging)
    if verify:
        checkpoint.verify()
    plan = plan_state_dict(checkpoint.specs, dtype=options.dtype, device=str(device))
    beside_a_device = has_staged_rows(plan, staging)
    if not beside_a_device:
        checkpoint.read_ahead(in_file_order=True)
    tensors = place_all(*read_apart(plan, checkpoint, beside_a_device=beside_a_device), staging).tensors
    if any(key != placed for key, placed in zip(checkpoint.specs, tensors, strict=True)):
        tensors = {key: tensors[key] for key in checkpoint.specs}
    return tensors | {dropped: tensors[kept] for dropped, kept in checkpoint.aliases.items()}


def load_model(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
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
    verify: bool = False,
    **where: Any,
) -> LoadReport:
    """Fill any module from a checkpoint.

    A parameter on the meta device becomes a view of the mapped file (or a tensor on ``device``); one that has memory
    keeps it and is overwritten in place, so that optimisers and hooks that hold it stay right.

    Args:
        module: the module, built on meta or for real.
        path: a folder, one weight file, an index, or a hub id.
        device: where parameters on meta shall be made; None for the CPU.
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
        verify: first compare all bytes of the files with their checksums (see `Checkpoint.verify`).
        where: which files, as for `open_checkpoint`.

    Raises:
        KeyMatchError: the keys do not fit.
        IntegrityError: with ``verify``, bytes are not those that were written.
        IncompleteModelError: something would be left on meta.
    """
    clock = Stopwatch()
    options = LoadOptions(
        dtype=parse_dtype(dtype),
        device_map={"": str(device or "cpu")},
        strict=strict,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        key_mapping=key_mapping,
        detached=detached,
        lazy=lazy,
        stream=stream,
        memory_budget_bytes=parse_memory_budget(memory_budget),
        pinned_bytes=parse_pinned_memory(pinned_memory),
    )
    with paused_collector():
        with clock("open"):
            checkpoint = open_checkpoint(path, **where)
            begin_pinning(options.device_map.values(), checkpoint.n_bytes, Staging(device_for, options.pinned_bytes))
            if memory_budget is None:
                checkpoint.read_ahead()
        if verify:
            with clock("verify"):
                checkpoint.verify()
        rules = KeyRules(fusions=tuple(fusions))
        return fill_module(module, checkpoint, options, source=os.fspath(path), clock=clock, rules=rules)


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
) -> LoadReport:
    """Plan, place and finish. Nothing of the module is changed before the plan has been accepted."""
    staging = Staging(devices, options.pinned_bytes, path_of=checkpoint.held_path)
    before_bytes = private_bytes()
    rules = rules or KeyRules()
    with clock("plan"):
        modules = walk_modules(module)
        slots = describe_modules(modules)
        plan = plan_model(checkpoint.specs, slots, options, rules, source)
        empty = _left_empty(plan, slots)
        if initialise is None and empty:
            raise _incomplete("the files do not have these parameters, and the module has no values for them", empty)
        arrivals = Arrivals(modules, plan, options, {fqn: slot.tied_to for fqn, slot in slots.items()})
    with clock("place"):
        existing = _tensors_of(module) if any(not slot.on_meta and slot.persistent for slot in slots.values()) else {}
        open_file: Callable[[str], MappedFile] = checkpoint.open_file
        if arrivals.reads_all:
            beside_a_device = has_staged_rows(plan, staging)
            plan, open_file = read_apart(plan, checkpoint, beside_a_device=beside_a_device)
        now, later = arrivals.split(plan)
        placed = place_all(now, open_file, staging, existing, title=os.path.basename(source) or source)
        # What is still to come is tied and finished with what stands for it.
        tensors = placed.tensors | {row.fqn: _placeholder(modules, row.fqn) for row in later.all_rows}
        n_remapped_bytes = placed.n_remapped_bytes
        n_remapped_bytes += sum(row.spec.n_bytes for row in later.fused if row.action is Action.REMAP)
    with clock("finish"):
        notes = [*checkpoint.notes, *placed.notes]
        notes += _finish(modules, slots, plan, tensors, empty, options, rules, initialise)
        notes += arrivals.begin(module, open_file, staging)
    bytes_by_action = plan.bytes_by_outcome(n_remapped_bytes)
    if options.detached:
        with clock("detach"):
            detach(module)
        bytes_by_action = _all_copied(bytes_by_action)
    after_bytes = private_bytes()
    result = LoadReport(
        source=source,
        files=checkpoint.files,
        format=checkpoint.format,
        n_tensors=len(plan.rows) + sum(len(row.spec.pieces) for row in plan.fused),
        n_bytes=sum(bytes_by_action.values()),
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


def _all_copied(counts: dict[str, int]) -> dict[str, int]:
    """Source bytes by what was done, after what stood on the files was given memory of its own."""
    n_mapped_bytes = counts.pop(Action.MAP.value, 0) + counts.pop(Action.REMAP.value, 0)
    return {Action.COPY.value: counts.pop(Action.COPY.value, 0) + n_mapped_bytes, **counts}


def _left_empty(plan: LoadPlan, slots: Mapping[str, Slot]) -> list[str]:
    """Names on meta that no row fills, directly or through a tie; of a tied group the first name stands for all."""
    placed = [*(row.fqn for row in plan.rows), *(row.fqn for row in plan.fused)]
    filled = {slots[fqn].tied_to or fqn for fqn in placed}
    return [
        fqn
        for fqn, slot in slots.items()
        if slot.on_meta and slot.persistent and slot.tied_to is None and fqn not in filled
    ]


def _finish(
    owners: Mapping[str, nn.Module],
    slots: Mapping[str, Slot],
    plan: LoadPlan,
    tensors: Mapping[str, torch.Tensor],
    empty: list[str],
    options: LoadOptions,
    rules: KeyRules,
    initialise: Initialiser | None,
) -> list[str]:
    """Put the tensors into the module, tie, initialise what no file has, audit. Returns what is worth a note."""
    device_of = device_finder(options.device_map)
    made = {fqn: _as_slot(owners, fqn, tensor) for fqn, tensor in tensors.items() if slots[fqn].on_meta}
    for fqn in empty:
        dtype = to_torch(target_dtype(slots[fqn], options.dtype, rules))
        made[fqn] = _as_slot(owners, fqn, torch.empty(slots[fqn].shape, dtype=dtype, device=device_of(fqn)))
    notes = _tie(slots, plan, made)
    for fqn, tensor in made.items():
        owner, name = _owner(owners, fqn)
        give(owner, name, tensor)
    if initialise is not None:
        with torch.no_grad():
            for fqn in empty:
                initialise(*_owner(owners, fqn), made[fqn])
    _place_computed_buffers(owners, slots, device_of)
    _audit(owners, slots)
    return notes


def _as_slot(owners: Mapping[str, nn.Module], fqn: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the kind of object that it replaces: a parameter with its attributes, or a buffer."""
    owner, name = _owner(owners, fqn)
    old = owner._parameters.get(name)
    if old is None:
        return tensor
    new = nn.Parameter(tensor, old.requires_grad and (tensor.is_floating_point() or tensor.is_complex()))
    if old.__dict__:
        new.__dict__.update(old.__dict__)
    return new


def _tie(slots: Mapping[str, Slot], plan: LoadPlan, made: dict[str, torch.Tensor]) -> list[str]:
    """Give every name of a tied group the one parameter, whichever of the names the files had.

    Where the files have two names of a group with different values, each keeps its own: the checkpoint knows better
    than the config. As transformers does.
    """
    groups: dict[str, list[str]] = {}
    for fqn, slot in slots.items():
        if slot.tied_to is not None and slot.on_meta and slot.persistent:
            groups.setdefault(slot.tied_to, [slot.tied_to]).append(fqn)
    regions = {row.fqn: row.spec.region for row in plan.rows}
    notes = []
    for names in groups.values():
        present = [fqn for fqn in names if fqn in made]
        first = present[0]
        for fqn in names:
            is_one_region = fqn in regions and regions[fqn] == regions.get(first)
            if fqn not in made or is_one_region or _same_bytes(made[fqn], made[first]):
                made[fqn] = made[first]
            else:
                notes.append(f"{fqn} and {first} are tied in the config but differ in the files: left untied")
    return notes


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))


def _place_computed_buffers(
    owners: Mapping[str, nn.Module], slots: Mapping[str, Slot], device_of: Callable[[str], str]
) -> None:
    """Move the buffers that no file has to the device of the parameters around them."""
    for fqn, slot in slots.items():
        if not slot.persistent and not slot.on_meta and device_of(fqn) != "cpu":
            owner, name = _owner(owners, fqn)
            owner._buffers[name] = owner._buffers[name].to(device_of(fqn))  # type: ignore[union-attr]


def _audit(owners: Mapping[str, nn.Module], slots: Mapping[str, Slot]) -> None:
    """Raise if anything is left on meta: computed buffers, and tensors that are plain attributes of a module.

    Whatever a state dict has was placed, initialised or refused before.
    """
    left = [fqn for fqn, slot in slots.items() if slot.on_meta and not slot.persistent]
    left += [
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in owners.items()
        for name, value in owner.__dict__.items()
        if type(value) not in _PLAIN_TYPES and isinstance(value, torch.Tensor) and value.is_meta
    ]
    if left:
        raise _incomplete("computed when the module was built, and built on meta", left)


def _incomplete(problem: str, names: list[str]) -> IncompleteModelError:
    return IncompleteModelError(
        f"the model would not be whole: {problem}",
        key=", ".join(collapse_keys(names)),
        expected="a value for every parameter and buffer",
        found=f"{len(names)} without",
        fix="name device='cpu' where a constructor computes a buffer; give parameters that no file has memory first",
    )


def _tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(module.named_buffers(remove_duplicate=False))


def _placeholder(owners: Mapping[str, nn.Module], fqn: str) -> torch.Tensor:
    """The tensor on meta that stands for one to come."""
    owner, name = _owner(owners, fqn)
    held = owner._parameters.get(name)
    placeholder = owner._buffers[name] if held is None else held
    assert placeholder is not None
    return placeholder.detach()


def _owner(owners: Mapping[str, nn.Module], fqn: str) -> tuple[nn.Module, str]:
    prefix, _, name = fqn.rpartition(".")
    return owners[prefix], name
