"""The loading stage of transformers, done by fastload's plan and placement: read, rename, fuse, cast, place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.core_model_loading import SkipParameters
from transformers.integrations.accelerate import expand_device_map
from transformers.utils.loading_report import LoadStateDictInfo

from fastload.checkpoint import Checkpoint
from fastload.detaching import detach
from fastload.dtypes import to_torch
from fastload.errors import OptionError
from fastload.filling import remember_report, with_views
from fastload.formats.checksums import CHECKSUMS
from fastload.formats.specs import TensorSpec
from fastload.hf.offloading import Convert, DiskWeights, OpenFile, names_left, split_plan, without_file
from fastload.hf.planning import Part, WeightPlan, dtype_finder, plan_weights
from fastload.hf.renaming import Source, rename_keys
from fastload.hf.sources import GivenTensors, open_files
from fastload.options import LoadOptions
from fastload.placement.device import Staging, has_staged_rows
from fastload.placement.modules import give
from fastload.placement.network import read_apart
from fastload.placement.placing import place_all
from fastload.plan.boxes import Joined
from fastload.plan.rows import Action, FusedRow, PlanRow
from fastload.plan.slots import walk_modules
from fastload.reports import LoadReport, Stopwatch
from fastload.storage.devices import device_for
from fastload.storage.mapping import MappedFile
from fastload.storage.memory import private_bytes
from fastload.streaming.arrivals import Arrivals

__all__ = ["place_weights"]

_EXTRA_STATE = "_extra_state"


@dataclass(slots=True)
class _Opened:
    """Where the tensors are: a checkpoint's files, or the caller's state dict with what else is in it."""

    specs: Mapping[str, TensorSpec]
    open_file: Callable[[str], MappedFile]
    checkpoint: Checkpoint | None
    others: tuple[str, ...] = ()


class _Done(NamedTuple):
    """What placing came to.

    Attributes:
        bytes_by_action: bytes in the files by what is done with them.
        sources: of what is converted and stays on disk.
        open_file: the way to open the files.
        notes: choices that were made.
    """

    bytes_by_action: dict[str, int]
    sources: dict[str, Source]
    open_file: OpenFile
    notes: tuple[str, ...]


def place_weights(
    model: Any,
    state_dict: Mapping[str, torch.Tensor] | None,
    files: Sequence[str] | None,
    asked: Any,
    how: LoadOptions,
    *,
    verify: bool = False,
) -> tuple[LoadStateDictInfo, DiskWeights | None, Callable[[], object]]:
    """Fill a model built on meta, as `PreTrainedModel._load_pretrained_model` does.

    Args:
        model: the model.
        state_dict: tensors by key, to be used instead of files.
        files: paths of the weight files.
        asked: transformers' LoadStateDictConfig of this load.
        how: what was asked of fastload alone: weights that arrive later.
        verify: first compare all bytes of the files with their checksums (see `Checkpoint.verify`).

    Returns:
        transformers' account of the keys; what stays on disk, if there is a device map that says so; and what lets
        later weights arrive, to be called when the load has ended.

    Raises:
        FormatError: a file is not what it should be. What the files lack is in the result, as transformers has it.
    """
    clock = Stopwatch()
    before_bytes = private_bytes()
    with clock("open"):
        opened = _open(state_dict, files, asked.sharded_metadata, how)
        if opened.checkpoint is not None and how.memory_budget_bytes is None and asked.device_mesh is None:
            opened.checkpoint.read_ahead()
    if verify:
        with clock("verify"):
            _verify(opened)
    # What a caller gave as a state dict is in memory: there is nothing to be read.
    staging = Staging(lambda name: None)
    if opened.checkpoint is not None:
        staging = Staging(device_for, how.pinned_bytes, path_of=opened.checkpoint.held_path)
    with clock("plan"):
        modules = walk_modules(model)
        wanted = _state_of(model, modules)
        transforms = asked.weight_mapping or []
        renamed = rename_keys(opened.specs, transforms, model, wanted)
        left = names_left(model, wanted, asked, opened.checkpoint, staging.devices)
        dtype_of = dtype_finder(asked.dtype_plan or {}, wanted, as_built=left.on_disk)
        device_of = _device_finder(asked.device_map, wanted)
        parts = _parts_of(modules, asked)
        weights = plan_weights(renamed, opened.specs, wanted, model.config, dtype_of, device_of, parts)
        if parts and opened.checkpoint is not None:
            weights = replace(weights, plan=with_views(weights.plan, modules, opened.checkpoint))
            # What lies between the rows of a slice is another rank's.
            apart = (Action.SLICE, Action.STRIDE)
            specs = [row.spec for row in weights.plan.rows if row.action not in apart]
            pieces = [piece.spec for row in weights.plan.fused for piece in row.spec.pieces]
            opened.checkpoint.read_ahead(specs + [spec for spec in pieces if spec.view is None])
        weights, rows_left, left = split_plan(weights, left)
        arrivals = Arrivals(modules, weights.plan, how, model.all_tied_weights_keys, staging)
    info = _info(wanted, weights)
    info.unexpected_keys.update(opened.others)
    with clock("place"):
        convert = partial(_converted, model, opened.specs, info, dtype_of, device_of)
        done = _place(modules, weights, opened, info, asked, convert, left.on_disk, arrivals, staging, parts)
        disk = None
        if left or "disk" in map(str, (asked.device_map or {}).values()):
            convert = partial(_converted, model, opened.specs, None, dtype_of, device_of)
            held = opened.open_file if opened.checkpoint is None else opened.checkpoint
            disk = DiskWeights(rows_left, done.sources, opened.specs, held, convert, staging)
            _set_types(modules, rows_left)
            _mark(modules, disk, info)
        if asked.disable_mmap:
            detach(model)
    # Saving reverts what loading applied.
    model._weight_conversions = [transform for transform in transforms if transform.was_used()]
    n_tensors = len(opened.specs) - len(renamed.unexpected)
    report = _report(asked, opened, info, done, n_tensors, clock, before_bytes)
    remember_report(model, report if disk is None else replace(report, notes=(*report.notes, *disk.notes)))
    return info, disk, partial(arrivals.begin, model, done.open_file)


def _verify(opened: _Opened) -> None:
    if opened.checkpoint is None:
        raise OptionError("a state dict that is in memory has no checksums", fix="leave out verify")
    opened.checkpoint.verify()


def _report(
    asked: Any,
    opened: _Opened,
    info: LoadStateDictInfo,
    done: _Done,
    n_tensors: int,
    clock: Stopwatch,
    before_bytes: int | None,
) -> LoadReport:
    """The account of a load; what of the model no key fills is in transformers' own."""
    after_bytes = private_bytes()
    checkpoint = opened.checkpoint
    return LoadReport(
        source=str(asked.pretrained_model_name_or_path or "the state dict"),
        files=checkpoint.files if checkpoint else (),
        format=checkpoint.format if checkpoint else "",
        n_tensors=n_tensors,
        n_bytes=sum(done.bytes_by_action.values()),
        n_read_bytes=sum(done.bytes_by_action.values()),
        bytes_by_action=done.bytes_by_action,
        stages_ms=clock.stages_ms,
        private_bytes=None if before_bytes is None or after_bytes is None else after_bytes - before_bytes,
        unexpected_keys=tuple(sorted(info.unexpected_keys)),
        mismatched_keys=tuple((name, tuple(found), tuple(built)) for name, found, built in info.mismatched_keys),
        notes=(*(checkpoint.notes if checkpoint else ()), *done.notes),
    )


def _state_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The model's state dict, without its hooks and a call per module where there are none."""
    plain = nn.Module
    for module in modules.values():
        kind = type(module)
        if (
            module._state_dict_hooks
            or module._state_dict_pre_hooks
            or kind.state_dict is not plain.state_dict
            or kind._save_to_state_dict is not plain._save_to_state_dict
            or kind.get_extra_state is not plain.get_extra_state
        ):
            return model.state_dict()
    state: dict[str, Any] = {}
    for prefix, module in modules.items():
        dot = f"{prefix}." if prefix else ""
        state.update((dot + name, tensor) for name, tensor in module._parameters.items() if tensor is not None)
        hidden = module._non_persistent_buffers_set
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in hidden:
                state[dot + name] = buffer
    return state


def _open(
    state_dict: Mapping[str, torch.Tensor] | None,
    files: Sequence[str] | None,
    index: Mapping[str, Any] | None,
    how: LoadOptions,
) -> _Opened:
    if state_dict is not None:
        if how.memory_budget_bytes is not None:
            raise OptionError(
                "a memory budget is for weights in files, and these are in memory already",
                found="state_dict and memory_budget",
                fix="leave one of them out",
            )
        given = GivenTensors(state_dict)
        return _Opened(given.specs, lambda path: given, None, given.others)
    assert files is not None
    checkpoint = open_files(files, index and index.get("weight_map"), (index or {}).get(CHECKSUMS))
    return _Opened(checkpoint.specs, checkpoint.open_file, checkpoint, checkpoint.others)


def _device_finder(device_map: Mapping[str, Any] | None, names: Mapping[str, Any]) -> Callable[[str], str]:
    """name -> device, by transformers' rules for device maps; what is to lie on disk is on the CPU first."""
    if not device_map or set(device_map) == {""}:
        only = _device_name((device_map or {}).get("", "cpu"))
        return lambda name: only
    devices = {name: _device_name(device) for name, device in expand_device_map(dict(device_map), list(names)).items()}
    return devices.__getitem__


def _device_name(device: Any) -> str:
    return "cpu" if device == "disk" else str(torch.device(device))


def _info(wanted: Mapping[str, Any], weights: WeightPlan) -> LoadStateDictInfo:
    mismatched = weights.plan.mismatched
    return LoadStateDictInfo(
        missing_keys=set(wanted) - {name for name, _, _ in mismatched},
        unexpected_keys=set(weights.plan.keys.unexpected),
        mismatched_keys=set(mismatched),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def _place(
    modules: Mapping[str, nn.Module],
    weights: WeightPlan,
    opened: _Opened,
    info: LoadStateDictInfo,
    asked: Any,
    convert: Convert,
    on_disk: frozenset[str],
    arrivals: Arrivals,
    staging: Staging,
    parts: Mapping[str, Part],
) -> _Done:
    """Make all tensors and give them to the model."""
    plan, open_file = weights.plan, opened.open_file
    if opened.checkpoint is not None and arrivals.reads_all:
        beside_a_device = has_staged_rows(plan, staging)
        plan, open_file = read_apart(plan, opened.checkpoint, beside_a_device=beside_a_device)
    elif opened.checkpoint is None:
        plan = replace(plan, rows=tuple(map(without_file, plan.rows)), fused=tuple(map(without_file, plan.fused)))
    title = os.path.basename(str(asked.pretrained_model_name_or_path or "")) or "loading"
    now, later = arrivals.split(plan)
    placed = place_all(now, open_file, staging, title=title)
    n_remapped_bytes = placed.n_remapped_bytes
    n_remapped_bytes += sum(row.spec.n_bytes for row in later.fused if row.action is Action.REMAP)
    _set(modules, placed.tensors, info, parts)
    _mark(modules, [row.fqn for row in later.all_rows], info)
    left: dict[str, Source] = {}
    for source in weights.conversions:
        # What stays on disk is made too, for its names, and to tell now what cannot be made.
        made = convert(source, open_file)
        left |= dict.fromkeys(on_disk.intersection(made), source)
        kept = {name: _own_part(tensor, parts.get(name)) for name, tensor in made.items() if name not in on_disk}
        _set(modules, kept, info, parts)
    counts = plan.bytes_by_outcome(n_remapped_bytes)
    if weights.n_conversion_bytes:
        counts[Action.COPY.value] = counts.get(Action.COPY.value, 0) + weights.n_conversion_bytes
    return _Done(counts, left, open_file, placed.notes)


def _converted(
    model: Any,
    specs: Mapping[str, TensorSpec],
    info: LoadStateDictInfo | None,
    dtype_of: Callable[[str], torch.dtype],
    device_of: Callable[[str], str],
    source: Source,
    open_file: OpenFile,
) -> dict[str, torch.Tensor]:
    """What transformers' own operations make. Where they fail, nothing, and the info tells; without one that raises."""
    converter, dtype, device = deepcopy(source.converter), dtype_of(source.name), device_of(source.name)
    for pattern, keys in source.keys.items():
        for key in keys:
            tensor = open_file(specs[key].region.file).tensor(specs[key])
            converter.add_tensor(source.name, key, pattern, tensor.to("cpu" if converter.force_cpu else device, dtype))
    try:
        made = converter.convert(source.name, model=model, config=model.config, loading_info=info)
    except SkipParameters:
        return {}
    return {name: (tensor[0] if isinstance(tensor, list) else tensor).to(device) for name, tensor in made.items()}


def _parts_of(modules: Mapping[str, nn.Module], asked: Any) -> Mapping[str, Part]:
    """What this rank owns of tensors that are laid out over several."""
    if asked.device_mesh is None:
        return {}
    from fastload.distributed.layouts import parts_of

    return parts_of(modules)


def _own_part(tensor: torch.Tensor, part: Part | None) -> torch.Tensor:
    """What this rank owns of a whole tensor."""
    if part is None:
        return tensor
    boxes = part.boxes if isinstance(part, Joined) else (part,)
    found = [tensor[tuple(slice(begin, begin + size) for begin, size in zip(*box, strict=True))] for box in boxes]
    return torch.cat(found, dim=part.dim) if isinstance(part, Joined) else found[0].contiguous()


def _set(
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, torch.Tensor],
    info: LoadStateDictInfo,
    parts: Mapping[str, Part],
) -> None:
    """Put tensors into the modules, marked as loaded, so that transformers' ending does not initialise them."""
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        module = modules[prefix]
        info.missing_keys.discard(name)
        if last == _EXTRA_STATE:
            module.set_extra_state(tensor)
            continue
        built = getattr(module, last)
        if name in parts:
            from fastload.distributed.layouts import like

            tensor = like(tensor, built)
        if built is None:
            info.unexpected_keys.add(name)
        elif built.shape != tensor.shape:
            info.mismatched_keys.add((name, tensor.shape, built.shape))
        elif last in module._buffers:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            give(module, last, tensor)
        else:
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, tensor.is_floating_point())
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            give(module, last, tensor)


def _set_types(modules: Mapping[str, nn.Module], rows: Iterable[PlanRow | FusedRow]) -> None:
    """Have what stays without memory say the type that it will have."""
    for row in rows:
        prefix, _, last = row.fqn.rpartition(".")
        built = getattr(modules[prefix], last)
        if built.dtype != to_torch(row.dtype):
            empty = torch.empty_like(built, dtype=to_torch(row.dtype))
            is_buffer = last in modules[prefix]._buffers
            give(modules[prefix], last, empty if is_buffer else nn.Parameter(empty, empty.is_floating_point()))


def _mark(modules: Mapping[str, nn.Module], names: Iterable[str], info: LoadStateDictInfo) -> None:
    """Mark tensors as loaded that stay as they are for now: without memory."""
    for name in names:
        prefix, _, last = name.rpartition(".")
        getattr(modules[prefix], last)._is_hf_initialized = True
        info.missing_keys.discard(name)
