"""Making plans: specs x slots x options -> rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from types import MappingProxyType

from fastload.dtypes import DTYPES, DType
from fastload.errors import KeyMatchError
from fastload.formats.runs import runs_of
from fastload.formats.specs import TensorSpec
from fastload.options import LoadOptions
from fastload.plan.boxes import narrow, narrow_fused
from fastload.plan.fusing import FusedSpec, fuse
from fastload.plan.keys import KeyMatch, KeyRules, match_keys
from fastload.plan.rows import Action, FusedRow, LoadPlan, PlanRow
from fastload.plan.slots import Slot
from fastload.reports import collapse_keys, format_bytes

__all__ = ["device_finder", "plan_fused_row", "plan_model", "plan_part", "plan_row", "plan_state_dict", "target_dtype"]

_F32 = DTYPES["F32"]
_F16 = DTYPES["F16"]
_ITEMSIZES = {dtype: dtype.itemsize for dtype in DTYPES.values()}
# Looking up a member of an enumeration costs 0.1 us.
_MAP = Action.MAP
_new = tuple.__new__
_HAS_MEMORY = "the module has memory of its own"


def plan_state_dict(
    specs: Mapping[str, TensorSpec],
    *,
    dtype: DType | None,
    device: str,
    fused: Mapping[str, FusedSpec] = MappingProxyType({}),
) -> LoadPlan:
    """A plan for a plain state dict: every tensor under its own key, on one device."""
    targets = {kind: dtype if dtype and kind.castable else kind for kind in DTYPES.values()}
    rows = [plan_row(key, spec, targets[spec.dtype], device) for key, spec in specs.items()]
    fused_rows = [plan_fused_row(key, spec, targets[spec.dtype], device) for key, spec in fused.items()]
    return LoadPlan(
        tuple(rows), KeyMatch({key: key for key in chain(specs, fused)}, (), (), ()), fused=tuple(fused_rows)
    )


def plan_model(
    specs: Mapping[str, TensorSpec],
    slots: Mapping[str, Slot],
    options: LoadOptions,
    rules: KeyRules,
    source: str,
    *,
    fused: Mapping[str, FusedSpec] = MappingProxyType({}),
    others: Iterable[str] = (),
) -> LoadPlan:
    """A plan for a model.

    Args:
        specs: the files' tensors by key.
        slots: the model's tensors by name.
        options: what the caller asked for.
        rules: what the architecture knows of its keys.
        source: the checkpoint's path, for messages.
        fused: the files' tensors that lie there in pieces, by key.
        others: keys of what the files hold beside tensors. They fill nothing.

    Raises:
        KeyMatchError: one message with every problem: shapes that differ (unless ignore_mismatched_sizes), and under
            strict also missing and unexpected keys.
    """
    single, fused_specs = fuse(specs, rules.fusions) if rules.fusions else (specs, [])
    fused_by_key = {**fused, **{spec.key: spec for spec in fused_specs}}
    keys = match_keys([*single, *fused_by_key], slots, rules, options.key_mapping, others=others)
    device_of = device_finder(options.device_map)
    rows: list[PlanRow] = []
    fused_rows: list[FusedRow] = []
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for key, fqn in keys.fqn_of_key.items():
        slot = slots[fqn]
        spec = fused_by_key.get(key) or single[key]
        if spec.shape != slot.shape:
            mismatched.append((fqn, spec.shape, slot.shape))
            continue
        wanted = target_dtype(slot, options.dtype, rules)
        dtype = wanted if wanted.castable and spec.dtype.castable else spec.dtype
        if isinstance(spec, FusedSpec):
            spec = spec if slot.box is None else narrow_fused(spec, slot.box)
            if slot.on_meta:
                fused_rows.append(plan_fused_row(fqn, spec, dtype, device_of(fqn)))
            else:
                fused_rows.append(FusedRow(fqn, spec, slot.dtype, "", Action.GATHER, _HAS_MEMORY))
        elif slot.box is not None:
            rows.append(plan_part(slot, spec, dtype, device_of(fqn)))
        elif slot.on_meta:
            rows.append(plan_row(fqn, spec, dtype, device_of(fqn)))
        else:
            rows.append(PlanRow(fqn, spec, slot.dtype, "", Action.FILL, _HAS_MEMORY))
    rows.sort(key=lambda row: row.spec.region[:2])
    plan = LoadPlan(tuple(rows), keys, tuple(mismatched), tuple(fused_rows))
    _check(plan, options, source)
    return plan


def plan_row(fqn: str, spec: TensorSpec, dtype: DType, device: str) -> PlanRow:
    """How a tensor of the files becomes one of its own, of a type and on a device."""
    _, kind, _, (_, offset, _, encoding), _ = spec
    action, reason = _MAP, ""
    if device != "cpu":
        action, reason = Action.MOVE, f"to {device}"
    elif dtype is not kind:
        action, reason = Action.CAST, f"{kind} to {dtype}"
    elif encoding is not None:
        action, reason = Action.DECODE, "compressed or big-endian in the file"
    elif offset % _ITEMSIZES[kind]:
        action, reason = Action.COPY, f"not on a multiple of {_ITEMSIZES[kind]} bytes in the file"
    # Half the price of calling the class, of which there is one a tensor.
    return _new(PlanRow, (fqn, spec, dtype, device, action, reason))


def plan_part(slot: Slot, whole: TensorSpec, dtype: DType, device: str) -> PlanRow:
    """How the part of a tensor that this rank owns reaches it."""
    assert slot.box is not None
    spec = narrow(whole, slot.box)
    if slot.on_meta:
        row = plan_row(slot.fqn, spec, dtype, device)
    else:
        row = PlanRow(slot.fqn, spec, slot.dtype, "", Action.FILL, _HAS_MEMORY)
    if spec is whole or spec.view is None:
        return row
    reason = "a part of what can only be decoded whole"
    if spec.region.encoding is None:
        runs = runs_of(spec)
        reason = f"a part that lies in {runs.n_runs} runs of {format_bytes(runs.n_bytes)} in the file"
    return row._replace(action=Action.SLICE, reason=reason)


def plan_fused_row(fqn: str, spec: FusedSpec, dtype: DType, device: str) -> FusedRow:
    """How many tensors of the files become one, of a type and on a device."""
    if device != "cpu":
        return FusedRow(fqn, spec, dtype, device, Action.MOVE, f"to {device}")
    reason = ""
    if sys.platform != "linux":
        reason = "pages can be remapped on Linux only"
    elif dtype is not spec.dtype:
        reason = f"{spec.dtype} to {dtype}"
    elif not spec.n_bytes:
        reason = "empty"
    elif any(piece.spec.region.encoding or piece.spec.view for piece in spec.pieces):
        reason = "encoded, or not contiguous, in the file"
    elif not all(piece.is_contiguous for piece in spec.pieces):
        reason = "pieces alternate in the fused tensor"
    return FusedRow(fqn, spec, dtype, device, Action.GATHER if reason else Action.REMAP, reason)


def target_dtype(slot: Slot, dtype: DType | None, rules: KeyRules) -> DType:
    """The type a slot will have: the caller's for floating point slots, with the architecture's exceptions."""
    if dtype is None or not slot.dtype.castable:
        return slot.dtype
    if dtype is _F16 and any(part in slot.fqn.split(".") for part in rules.keep_in_fp32):
        return _F32
    return dtype


def device_finder(device_map: Mapping[str, str]) -> Callable[[str], str]:
    """name -> device, by the longest module name of the map that the name lies in; "cpu" where none fits."""
    if set(device_map) == {""}:
        only = device_map[""]
        return lambda fqn: only

    def find(fqn: str) -> str:
        name = fqn
        while name:
            if name in device_map:
                return device_map[name]
            name = name.rpartition(".")[0]
        return device_map.get("", "cpu")

    return find


def _check(plan: LoadPlan, options: LoadOptions, source: str) -> None:
    """Raise once, for everything that cannot be accepted."""
    problems: list[str] = []
    if options.strict or not options.ignore_mismatched_sizes:
        problems += [
            f"shape of {fqn}: {list(in_file)} in the file, {list(in_model)} in the model"
            for fqn, in_file, in_model in plan.mismatched
        ]
    if options.strict:
        problems += _listed("missing in the files", plan.keys.missing)
        problems += _listed("not in the model", plan.keys.unexpected)
    if not problems:
        return
    fix = "load with the config that the checkpoint was saved with"
    if plan.mismatched and not options.strict:
        fix += ", or pass ignore_mismatched_sizes=True to initialise these parameters anew"
    if options.strict:
        fix += ", rename keys with key_mapping, or pass strict=False"
    raise KeyMatchError(
        f"the checkpoint does not fit the model ({len(problems)} problems)",
        file=source,
        found="\n            ".join(problems),
        fix=fix,
    )


def _listed(problem: str, keys: Iterable[str]) -> list[str]:
    return [f"{problem}: {row}" for row in collapse_keys(keys)]
