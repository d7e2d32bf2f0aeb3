"""What is read, in parallel, and not mapped: cold files of network file systems, and what stays beside an accelerator.

A file of a network file system that is wholly cached is mapped as any other: its pages are there, cost nothing, and
are shared by all processes that load it.

Weights in the machine's memory of a model that is partly on an accelerator are copied there for each forward. A driver
that copies from a private writable mapping asks for its pages as if it would write to them, so that each is copied
first, one by one: 0.12 instead of 26.6 GB/s, and the memory is private afterwards all the same. To read them into
memory of their own takes as much of it, once, at the rate of reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fastload.checkpoint import Checkpoint
from fastload.plan.rows import Action, FusedRow, LoadPlan, PlanRow
from fastload.prefetching import stop_reading
from fastload.storage.mapping import MappedFile
from fastload.storage.reading import ReadFile
from fastload.storage.residency import file_system, residency

__all__ = ["read_apart"]

_BESIDE_A_DEVICE = "beside an accelerator, whose driver would copy a mapping's pages one by one first"


def read_apart(
    plan: LoadPlan, checkpoint: Checkpoint, *, beside_a_device: bool
) -> tuple[LoadPlan, Callable[[str], MappedFile]]:
    """The plan and the way to open its files, with what should not be mapped read now.

    Nothing changes for all others. What is being read ahead of such a file is stopped: the load reads it itself, and
    finds in the page cache what was read before.

    Args:
        plan: what to do.
        checkpoint: its files.
        beside_a_device: other rows of the plan are bound for an accelerator that staging reaches.
    """
    why = _BESIDE_A_DEVICE if beside_a_device else ""
    reasons = {file: reason for file in checkpoint.files if (reason := why or _why_read(checkpoint.descriptor(file)))}
    if not reasons:
        return plan, checkpoint.open_file
    stop_reading(reasons)
    files = {file: ReadFile(file, checkpoint.n_file_bytes(file), checkpoint.modified_ns(file)) for file in reasons}
    for path, opened in files.items():
        opened.fill(row.spec for row in plan.rows if row.action is Action.MAP and row.spec.region.file == path)
    rows = tuple(_read_row(row, reasons) for row in plan.rows)
    fused = tuple(_read_fused_row(row, reasons) for row in plan.fused)
    return replace(plan, rows=rows, fused=fused), lambda path: files.get(path) or checkpoint.open_file(path)


def _read_row(row: PlanRow, reasons: Mapping[str, str]) -> PlanRow:
    reason = reasons.get(row.spec.region.file)
    return row if row.action is not Action.MAP or reason is None else row._replace(action=Action.COPY, reason=reason)


def _read_fused_row(row: FusedRow, reasons: Mapping[str, str]) -> FusedRow:
    found = [reasons[piece.spec.region.file] for piece in row.spec.pieces if piece.spec.region.file in reasons]
    return row if row.action is not Action.REMAP or not found else row._replace(action=Action.GATHER, reason=found[0])


def _why_read(descriptor: int | None) -> str:
    """Why a file should be read and not mapped; "" if it should be mapped, or is not open."""
    if descriptor is None:
        return ""
    kind = file_system(descriptor)
    if not kind.is_network or residency(descriptor, exact=False).is_warm:
        return ""
    return f"cold, and on {kind.name}: read in parallel, as page faults would wait for the network one by one"
