"""Carrying out a plan from mapped files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fastload.dtypes import to_torch
from fastload.placement.slices import place_slices
from fastload.plan.rows import Action, LoadPlan, PlanRow
from fastload.progress import Progress
from fastload.storage.casting import CastRequest, cast_tensors
from fastload.storage.mapping import MappedFile

__all__ = ["place"]


def place(
    plan: LoadPlan,
    open_file: Callable[[str], MappedFile],
    existing: Mapping[str, torch.Tensor] | None = None,
    title: str = "loading",
    notes: list[str] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a plan by name.

    Args:
        plan: what to do.
        open_file: path -> the mapped file; called often, so it should remember.
        existing: the module's own tensors, for rows that fill memory that is there.
        title: label of the progress bar.
        notes: choices that were made are added to it.
    """
    existing = existing or {}
    mapped: dict[str, list[PlanRow]] = {}
    cast: list[PlanRow] = []
    moved: list[PlanRow] = []
    apart: list[PlanRow] = []
    as_mapped, as_cast, as_stride = Action.MAP, Action.CAST, Action.STRIDE  # looking them up costs 0.1 us a row
    for row in plan.rows:
        if row.action is as_mapped or row.action is as_stride:
            mapped.setdefault(row.spec.region.file, []).append(row)
        elif row.action is as_cast:
            cast.append(row)
        else:
            (apart if row.action is Action.SLICE else moved).append(row)
    placed: dict[str, torch.Tensor] = {}
    for path, rows in mapped.items():
        tensors = open_file(path).tensors([row.spec for row in rows])
        placed.update(zip([row.fqn for row in rows], tensors, strict=True))
    if cast or moved:
        with Progress(title, sum(row.spec.region.n_bytes for row in (*cast, *moved))) as progress, torch.no_grad():
            requests = [CastRequest(open_file(row.spec.region.file), row.spec, row.dtype) for row in cast]
            placed.update(zip([row.fqn for row in cast], cast_tensors(requests, progress.advance), strict=True))
            for row in moved:
                placed[row.fqn] = _write(row, open_file(row.spec.region.file), existing.get(row.fqn))
                progress.advance(row.spec.region.n_bytes)
    if apart:
        slices, found = place_slices(apart, open_file, existing, title)
        placed |= slices
        if notes is not None:
            notes += found
    return placed


def _write(row: PlanRow, file: MappedFile, destination: torch.Tensor | None) -> torch.Tensor:
    source = file.tensor(row.spec)
    if row.action in (Action.COPY, Action.DECODE):
        # The file made this tensor memory of its own, because its bytes cannot be used where they lie.
        return source
    if row.action is Action.FILL:
        assert destination is not None
        destination.copy_(source)
        result = destination
    else:
        # A driver that copies from a private writable mapping first breaks its copy-on-write, page by page.
        result = source.clone().to(row.device).to(to_torch(row.dtype))
    file.release(row.spec.region)
    return result
