"""A plan for a transformers model: its sources as rows, and what must be left to transformers' own operations.

Stacking, concatenating and chunking, which are nearly all that converters do, become rows: views of the files, pages
laid side by side, pieces written into place. Everything else is a conversion, run on tensors that are views.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, build_glob_alternation

from fastload.dtypes import DType, from_torch
from fastload.formats.specs import Region, TensorSpec
from fastload.hf.renaming import Renamed, Source
from fastload.plan import fusing
from fastload.plan.boxes import Box, Joined, narrow, narrow_fused, narrow_joined
from fastload.plan.keys import KeyMatch
from fastload.plan.planning import plan_fused_row, plan_part, plan_row
from fastload.plan.rows import Action, FusedRow, LoadPlan, PlanRow
from fastload.plan.slots import Slot

__all__ = ["Mismatch", "WeightPlan", "dtype_finder", "plan_weights"]

Part = Box | Joined
Mismatch = tuple[str, torch.Size, torch.Size]
"""(name, shape in the files, shape in the model)"""


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """What will be done.

    Attributes:
        plan: the tensors that fastload places.
        conversions: sources whose tensors transformers' operations make.
        n_conversion_bytes: bytes in the files of these.
    """

    plan: LoadPlan
    conversions: tuple[Source, ...]
    n_conversion_bytes: int


def dtype_finder(
    dtype_plan: Mapping[str, torch.dtype], wanted: Mapping[str, Any], *, as_built: Container[str] = ()
) -> Callable[[str], torch.dtype]:
    """name -> type it shall have: the one it was built with, unless a pattern of the plan says another.

    What is to be as built is so whatever the plan says: a forward makes of a tensor on disk what the model was built
    with.
    """
    built = {name: tensor.dtype for name, tensor in wanted.items() if isinstance(tensor, torch.Tensor)}
    if not dtype_plan:
        return built.__getitem__
    alternation, pattern_of_group, _ = build_glob_alternation(list(dtype_plan))

    def find(name: str) -> torch.dtype:
        match = alternation.search(name)
        return built[name] if match is None or name in as_built else dtype_plan[pattern_of_group[match.lastgroup]]

    return find


def plan_weights(
    renamed: Renamed,
    specs: Mapping[str, TensorSpec],
    wanted: Mapping[str, Any],
    config: Any,
    dtype_of: Callable[[str], torch.dtype],
    device_of: Callable[[str], str],
    parts: Mapping[str, Part],
) -> WeightPlan:
    """Plan every source.

    Args:
        renamed: what each name is made of.
        specs: the files' tensors by key.
        wanted: the model's state dict.
        config: the model's; converters look into it.
        dtype_of, device_of: name -> type and device that it shall have.
        parts: name -> what this rank owns, of tensors that are laid out over several.
    """
    rows: list[PlanRow] = []
    fused: list[FusedRow] = []
    conversions: list[Source] = []
    mismatched: list[Mismatch] = []

    def fits(name: str, shape: tuple[int, ...]) -> bool:
        expected = wanted[name].shape if isinstance(wanted[name], torch.Tensor) else shape
        if shape != expected:
            mismatched.append((name, torch.Size(shape), torch.Size(expected)))
        return shape == expected

    def add(name: str, spec: TensorSpec | fusing.FusedSpec, dtype: DType) -> None:
        if fits(name, spec.shape):
            row = _row_of(name, spec, dtype, device_of(name), parts.get(name))
            (fused if isinstance(row, FusedRow) else rows).append(row)  # type: ignore[arg-type]

    for source in renamed.sources.values():
        name = source.name
        if source.converter is None:
            spec = specs[next(iter(source.keys))]
            is_tensor = isinstance(wanted[name], torch.Tensor)
            add(name, spec, from_torch(dtype_of(name)) if is_tensor else spec.dtype)
            continue
        dtype = from_torch(dtype_of(name))
        if (joined := _joined(source, specs)) is not None and _can_be(joined.dtype, dtype):
            add(name, joined, dtype)
        elif (chunks := _chunks(source, specs, wanted, config)) is not None:
            for target, spec in chunks:
                add(target, spec, dtype)
        else:
            conversions.append(source)
    rows.sort(key=lambda row: row.spec.region[:2])
    keys = KeyMatch({row.spec.key: row.fqn for row in rows}, (), tuple(renamed.unexpected), ())
    n_bytes = sum(specs[key].region.n_bytes for source in conversions for keys in source.keys.values() for key in keys)
    return WeightPlan(LoadPlan(tuple(rows), keys, tuple(mismatched), tuple(fused)), tuple(conversions), n_bytes)


def _can_be(source: DType, wanted: DType) -> bool:
    return source is wanted or (source.castable and wanted.castable)


def _row_of(
    name: str, spec: TensorSpec | fusing.FusedSpec, dtype: DType, device: str, part: Part | None
) -> PlanRow | FusedRow:
    """How a tensor, or the part of it that this rank owns, gets where it belongs."""
    if isinstance(part, Joined):
        spec = narrow_joined(spec, part)
    if isinstance(spec, fusing.FusedSpec):
        return plan_fused_row(name, narrow_fused(spec, part) if isinstance(part, Box) else spec, dtype, device)
    if isinstance(part, Box) and _can_be(spec.dtype, dtype):
        return plan_part(Slot(name, dtype, spec.shape, box=part), spec, dtype, device)
    return _row(name, narrow(spec, part) if isinstance(part, Box) else spec, dtype, device)


def _row(name: str, spec: TensorSpec, dtype: DType, device: str) -> PlanRow:
    if _can_be(spec.dtype, dtype):
        return plan_row(name, spec, dtype, device)
    return PlanRow(name, spec, dtype, device, Action.MOVE, f"{spec.dtype} to {dtype}")


def _joined(source: Source, specs: Mapping[str, TensorSpec]) -> fusing.FusedSpec | None:
    """The tensor that a converter stacks, concatenates, or both; None where it does something else."""
    converter = source.converter
    kinds = [type(operation) for operation in converter.operations]
    if kinds not in ([MergeModulelist], [Concatenate], [MergeModulelist, Concatenate]):
        return None
    patterns: Sequence[str] = converter.source_patterns
    if set(source.keys) != set(patterns) or len(converter.target_patterns) != 1:
        return None
    parts = [[specs[key] for key in source.keys[pattern]] for pattern in patterns]
    if kinds == [Concatenate]:
        parts = [[spec] for part in parts for spec in part]
    elif kinds == [MergeModulelist, Concatenate] and len(patterns) < 2:
        return None
    stack = fusing.Stack(converter.operations[0].dim) if kinds[0] is MergeModulelist else None
    joint = fusing.Concatenate(converter.operations[-1].dim) if kinds[-1] is Concatenate else None
    return fusing.join(source.name, parts, stack, joint)


def _chunks(
    source: Source, specs: Mapping[str, TensorSpec], wanted: Mapping[str, Any], config: Any
) -> list[tuple[str, TensorSpec]] | None:
    """(name, part of the file) of each tensor that a converter cuts out of one along its first dimension; or None."""
    converter = source.converter
    keys = [key for matched in source.keys.values() for key in matched]
    if [type(operation) for operation in converter.operations] != [Chunk] or len(keys) != 1:
        return None
    operation, spec = converter.operations[0], specs[keys[0]]
    if not spec.shape or operation.dim % len(spec.shape) or spec.view is not None or spec.region.encoding is not None:
        return None
    targets = operation.get_target_patterns(converter.target_patterns, config=config)
    names = _names_of(targets, source.name)
    n_rows = -(-spec.shape[0] // len(targets))
    if names is None or any(name not in wanted for name in names) or not n_rows:
        return None
    row_bytes = spec.region.n_bytes // spec.shape[0]
    chunks = []
    for number, name in enumerate(names):
        begin, end = (min(edge * n_rows, spec.shape[0]) for edge in (number, number + 1))
        if begin < end:
            region = Region(spec.region.file, spec.region.offset_bytes + begin * row_bytes, (end - begin) * row_bytes)
            chunks.append((name, spec._replace(shape=(end - begin, *spec.shape[1:]), region=region)))
    return chunks


def _names_of(targets: Sequence[str], first: str) -> list[str] | None:
    """The names of a converter's targets, by where one of them is in the name that its first key was given."""
    whole = first.replace("*.", "0.")
    found = next((target for target in targets if target in whole), None)
    if found is None:
        return None
    before, _, after = whole.partition(found)
    return [before + target + after for target in targets]
