"""Carrying out a whole plan, on whatever devices its rows are bound for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastload.placement.cpu import place
from fastload.placement.device import Staging, place_on_devices
from fastload.placement.fused import place_fused
from fastload.plan.rows import LoadPlan
from fastload.storage.mapping import MappedFile

__all__ = ["Placed", "place_all"]


@dataclass(frozen=True, slots=True)
class Placed:
    """What came of a plan.

    Attributes:
        tensors: by name.
        n_remapped_bytes: bytes of fused tensors that are used where they lie in the files.
        notes: choices that were made, with the reason.
    """

    tensors: dict[str, torch.Tensor]
    n_remapped_bytes: int
    notes: tuple[str, ...]


def place_all(
    plan: LoadPlan,
    open_file: Callable[[str], MappedFile],
    staging: Staging,
    existing: Mapping[str, torch.Tensor] | None = None,
    title: str = "loading",
) -> Placed:
    """The tensors of a plan: on accelerators by staging, all others from the mapped files.

    Args:
        plan: what to do.
        open_file: path -> the mapped file.
        staging: how rows reach accelerators.
        existing: the module's own tensors, for rows that fill memory that is there.
        title: label of the progress bar.
    """
    existing = existing or {}
    plan, tensors, staged_notes = place_on_devices(plan, staging, existing, title)
    notes = [*staged_notes]
    tensors |= place(plan, open_file, existing, title, notes)
    fused, n_remapped_bytes = place_fused(plan, open_file, existing)
    return Placed(tensors | fused, n_remapped_bytes, tuple(notes))
