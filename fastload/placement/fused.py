"""Placing fused tensors: pages laid side by side where that can be, pieces written into place where it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from fastload.dtypes import to_torch
from fastload.formats.runs import runs_of
from fastload.plan.fusing import Piece
from fastload.plan.rows import Action, FusedRow, LoadPlan
from fastload.storage.mapping import MappedFile
from fastload.storage.remapping import FilePiece, lay_out

__all__ = ["place_fused", "remap"]


def place_fused(
    plan: LoadPlan,
    open_file: Callable[[str], MappedFile],
    existing: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], int]:
    """The fused tensors of a plan by name, and how many of their bytes are used where they lie in the files.

    There is never a stack of the pieces beside the result.

    Args:
        plan: what to do.
        open_file: path -> the mapped file.
        existing: the module's own tensors, for rows that fill memory that is there.
    """
    placed: dict[str, torch.Tensor] = {}
    n_mapped_bytes = 0
    for row in plan.fused:
        if row.action is Action.REMAP:
            for piece in row.spec.pieces:
                open_file(piece.spec.region.file)  # is it still the file whose header was read?
            placed[row.fqn], n_bytes = remap(row)
            n_mapped_bytes += n_bytes
        else:
            placed[row.fqn] = _gather(row, open_file, existing.get(row.fqn))
    return placed, n_mapped_bytes


def remap(row: FusedRow) -> tuple[torch.Tensor, int]:
    """The tensor of a row whose pieces are pages laid side by side, and how many of its bytes are used where they lie.

    Raises:
        UnreadableFileError: a file cannot be opened, mapped or read.
        TruncatedFileError: a file ends before its piece does.
    """
    itemsize = row.dtype.itemsize
    pieces = []
    for piece in row.spec.pieces:
        file, offset_bytes, n_bytes, _ = piece.spec.region
        pieces.append(FilePiece(file, offset_bytes, piece.offset * itemsize, n_bytes))
    layout = lay_out(pieces, row.spec.n_bytes, itemsize)
    tensor = torch.frombuffer(layout.buffer, dtype=to_torch(row.dtype)).view(row.spec.shape)
    return tensor, layout.n_mapped_bytes


def _gather(row: FusedRow, open_file: Callable[[str], MappedFile], existing: torch.Tensor | None) -> torch.Tensor:
    """Write every piece into its box, converted on the way; in parallel, because fresh pages are what it costs."""
    destination = existing
    if destination is None or not destination.is_contiguous():
        # A piece is a box of contiguous memory; what is laid out in another way gets a copy of the whole.
        destination = torch.empty(row.spec.shape, dtype=to_torch(row.dtype), device="cpu")

    def write(piece: Piece) -> None:
        file = open_file(piece.spec.region.file)
        if piece.spec.view is not None and piece.spec.region.encoding is None:
            file.ask_for(runs_of(piece.spec))
        with torch.no_grad():
            box = destination.as_strided(piece.spec.shape, piece.stride, destination.storage_offset() + piece.offset)
            box.copy_(file.part(piece.spec))
        file.release(piece.spec.region)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "fastload-gather") as writers:
        # Joining the results raises what a writer raised.
        list(writers.map(write, row.spec.pieces))
    if existing is not None and existing is not destination:
        with torch.no_grad():
            return existing.copy_(destination)
    return destination.to(row.device) if row.action is Action.MOVE else destination
