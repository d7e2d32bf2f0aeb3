"""``fastload inspect``: what is in a checkpoint, from its headers alone."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from fastload.checkpoint import Checkpoint
from fastload.cli.arguments import Where
from fastload.cli.output import print_json, print_line, print_table, require_tables
from fastload.formats.specs import FusedSpec, Region, TensorSpec
from fastload.reports import collapse_keys, format_bytes

__all__ = ["Module", "describe", "group_by_module", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Print the contents of a checkpoint."""
    if not arguments.json:
        require_tables()
    where = Where.of(arguments)
    checkpoint = Checkpoint(where.locate(in_chunks=True))
    if arguments.json:
        print_json({"source": where.path, **describe(checkpoint)})
        return 0
    columns = ("tensor", "n", "shape", "dtype", "bytes")
    rows = (_rows_of_all if arguments.all else _rows_by_module)(_specs(checkpoint))
    print_table(columns, rows, right=("n", "bytes"))
    print_line()
    _print_totals(where.path, checkpoint)
    return 0


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything the headers say, as plain data. Bytes that several tensors share count once."""
    own_bytes = _own_bytes(_specs(checkpoint))
    modules = [
        {"name": module.name, "n_tensors": len(module.specs), "n_bytes": _sum(module.specs, own_bytes)}
        for module in group_by_module(_specs(checkpoint))
    ]
    tensors = [
        {
            "key": spec.key,
            "dtype": spec.dtype.code,
            "shape": list(spec.shape),
            "n_bytes": _n_bytes(spec),
            "file": regions[0].file if len(regions) == 1 else None,
            "offset_bytes": regions[0].offset_bytes if len(regions) == 1 else None,
            "n_chunks": len(regions),
            "encoded": any(region.encoding is not None for region in regions),
        }
        for spec in _specs(checkpoint).values()
        for regions in (_regions(spec),)
    ]
    text = {"metadata": checkpoint.metadata, "notes": list(checkpoint.notes)}
    return {**_totals(checkpoint), **text, "modules": modules, "tensors": tensors}


@dataclass(frozen=True, slots=True)
class Module:
    """A part of a model, or all parts of it that differ only in their number.

    Attributes:
        name: its name, such as ``encoder.layer.{0...11}``; "" for tensors that are in no module.
        n_repeats: how many parts it stands for.
        specs: their tensors.
    """

    name: str
    n_repeats: int
    specs: tuple[TensorSpec | FusedSpec, ...]


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def group_by_module(specs: Mapping[str, TensorSpec | FusedSpec]) -> list[Module]:
    """The tensors by module, in the order of the files.

    A module is a numbered block (all of its numbers together), or the largest part of the model without such blocks.
    """
    blocks = {block for key in specs if (block := _block(key))}
    holders = {""} | {prefix for block in blocks for prefix in _prefixes(block)}
    groups: dict[str, dict[str, list[TensorSpec | FusedSpec]]] = {}
    for key, spec in specs.items():
        name = _block(key) or next((part for part in _prefixes(key)[1:] if part not in holders), key.rpartition(".")[0])
        groups.setdefault(_NUMBER.sub("*", name), {}).setdefault(name, []).append(spec)
    return [
        Module(_joined(members), len(members), tuple(spec for held in members.values() for spec in held))
        for members in groups.values()
    ]


def _block(key: str) -> str:
    """The name up to its last number: the numbered block that the tensor is in; "" where there is none."""
    numbers = list(_NUMBER.finditer(key, 0, max(0, key.rfind("."))))
    return key[: numbers[-1].end()] if numbers else ""


def _prefixes(name: str) -> list[str]:
    """The modules around a name, from the outermost, which is ""."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _joined(names: Iterable[str]) -> str:
    """Names that differ in their numbers, as one: ``layers.{0...11}``."""
    return ", ".join(row[:-1] for row in collapse_keys(f"{name}." for name in names))


def _rows_by_module(specs: Mapping[str, TensorSpec | FusedSpec]) -> Iterable[tuple[str, ...]]:
    own_bytes = _own_bytes(specs)
    for module in group_by_module(specs):
        n_bytes = format_bytes(_sum(module.specs, own_bytes))
        alike: dict[tuple[str, str, str], list[TensorSpec | FusedSpec]] = {}
        for spec in module.specs:
            alike.setdefault((_NUMBER.sub("*", spec.key), _shape(spec), spec.dtype.code), []).append(spec)
        yield (module.name or "(no module)", "", "", "", n_bytes)
        for (_, shape, dtype), same in alike.items():
            yield (f"  {_tensor_name(module, same)}", str(len(same)), shape, dtype, format_bytes(_sum(same, own_bytes)))


def _tensor_name(module: Module, same: list[TensorSpec | FusedSpec]) -> str:
    """A tensor's name in its module; its full name where not all repeats of the module have it alike."""
    block = _block(same[0].key)
    if block and len(same) == module.n_repeats:
        return same[0].key[len(block) + 1 :]
    if not block and module.name and len(same) == 1:
        return same[0].key[len(module.name) + 1 :]
    return _joined(spec.key for spec in same)


def _rows_of_all(specs: Mapping[str, TensorSpec | FusedSpec]) -> Iterable[tuple[str, ...]]:
    for spec in specs.values():
        yield (spec.key, "1", _shape(spec), spec.dtype.code, format_bytes(_n_bytes(spec)))


def _print_totals(source: str, checkpoint: Checkpoint) -> None:
    found = _totals(checkpoint)
    print_line(f"{source}: {checkpoint.format}, {found['n_tensors']:,} tensors, {found['n_parameters']:,} parameters")
    for name, total in found["dtypes"].items():
        print_line(f"  {name:<8} {total['n_tensors']:>6,} tensors  {format_bytes(total['n_bytes']):>9}")
    for path, total in found["files"].items():
        size = f"{total['n_tensors']:>6,} tensors  {format_bytes(total['n_bytes']):>9}"
        print_line(f"  {'file':<8} {size}  {os.path.basename(path)}")
    print_line(f"  {'total':<8} {found['n_tensors']:>6,} tensors  {format_bytes(checkpoint.n_bytes):>9}")
    for note in checkpoint.notes:
        print_line(f"  note     {note}")


def _totals(checkpoint: Checkpoint) -> dict[str, Any]:
    own_bytes = _own_bytes(_specs(checkpoint))
    files = {path: {"n_tensors": 0, "n_bytes": 0} for path in checkpoint.files}
    types: dict[str, dict[str, int]] = {}
    for key, spec in _specs(checkpoint).items():
        of_type = types.setdefault(spec.dtype.code, {"n_tensors": 0, "n_bytes": 0})
        of_type["n_tensors"] += 1
        of_type["n_bytes"] += own_bytes[key]
        for region in _regions(spec):
            files[region.file]["n_tensors"] += 1
            files[region.file]["n_bytes"] += own_bytes[key] and region.n_bytes
    return {
        "format": checkpoint.format,
        "n_tensors": len(checkpoint),
        "n_parameters": sum(prod(spec.shape) for key, spec in _specs(checkpoint).items() if own_bytes[key]),
        "n_bytes": checkpoint.n_bytes,
        "files": files,
        "dtypes": types,
    }


def _own_bytes(specs: Mapping[str, TensorSpec | FusedSpec]) -> dict[str, int]:
    """Bytes of each tensor's storage; none for a tensor whose storage an earlier one has."""
    seen: set[tuple[str, int, int]] = set()
    own: dict[str, int] = {}
    for spec in specs.values():
        regions = _regions(spec)
        place = regions[0][:3]
        own[spec.key] = 0 if place in seen else sum(region.n_bytes for region in regions)
        seen.add(place)
    return own


def _specs(checkpoint: Checkpoint) -> Mapping[str, TensorSpec | FusedSpec]:
    return {**checkpoint.specs, **checkpoint.fused}


def _regions(spec: TensorSpec | FusedSpec) -> list[Region]:
    """Where a tensor lies: in one place, or in chunks that ranks have written."""
    return [piece.spec.region for piece in spec.pieces] if isinstance(spec, FusedSpec) else [spec.region]


def _sum(specs: Iterable[TensorSpec | FusedSpec], own_bytes: Mapping[str, int]) -> int:
    return sum(own_bytes[spec.key] for spec in specs)


def _n_bytes(spec: TensorSpec | FusedSpec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def _shape(spec: TensorSpec | FusedSpec) -> str:
    return " x ".join(map(str, spec.shape)) if spec.shape else "scalar"
