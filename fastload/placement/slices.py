"""Placing a rank's parts whose rows lie apart in the files.

In a file that is warm, long rows are used where they lie: a view of the mapping takes no time and no memory, and all
ranks of a machine share its pages. Products with many tokens take as long with rows apart, with one token a tenth more
for rows of 3 to 7 KB, and twice as long for rows of half a KB. What is short, converted, cold or bound for a device is
copied.

Such a part goes block by block in the order of the files. Where a file is cold, the kernel is first asked for the runs
blocks ahead, on threads, and for nothing else: page faults would read all that lies between the first run and the last,
the other ranks' parts too. Then, and at once where the file is warm, a block is copied from the mapping into its place,
converted on the way. Measured: from a cold file that is faster than to read each run by a call of its own, and from a
warm one too, since a copy by rows from mapped pages is one operation of torch's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from math import prod
from typing import NamedTuple

import torch

from fastload.checkpoint import Checkpoint
from fastload.dtypes import to_torch
from fastload.formats.runs import runs_of
from fastload.formats.specs import StorageView, TensorSpec, contiguous_stride
from fastload.plan.boxes import Box, narrow
from fastload.plan.rows import Action, LoadPlan, PlanRow
from fastload.progress import Progress
from fastload.reports import format_bytes
from fastload.storage.mapping import MappedFile, is_mappable
from fastload.storage.residency import residency
from fastload.storage.slabs import HUGE_PAGE, HugePages, Slab

__all__ = ["place_slices", "use_where_they_lie"]

_LEAST_ROW_BYTES = 2048
# Of a file that is used as a warm one: to copy all columns takes longer than to read so little of it.
_MOST_COLD_SHARE = 0.05
# Below this the trial of huge pages, one for each slab, may take longer than they save.
_LEAST_SLAB_BYTES = 8 * HUGE_PAGE
# Of a part, what is asked for and then copied at once; and the most that may lie between its first byte and its last,
# all of which is copied where the file has it on an odd address.
_BLOCK_BYTES = 8 << 20
_SPAN_BYTES = 32 << 20
_N_AHEAD = 8
_N_THREADS = 2


class _Block(NamedTuple):
    """Some of the rows of a part.

    Attributes:
        row: the part.
        spec: where they are in the file.
        box: where they are in the part.
        is_last: the part is whole with them.
    """

    row: PlanRow
    spec: TensorSpec
    box: Box
    is_last: bool


def use_where_they_lie(plan: LoadPlan, checkpoint: Checkpoint) -> LoadPlan:
    """The plan with those parts in warm files as views that can be: unconverted, aligned, and of long rows.

    A few pages of a warm file may be missing, since kernels take back what nobody has used for a while.
    """
    warm: dict[str, bool] = {}

    def is_warm(file: str) -> bool:
        if file not in warm:
            descriptor = checkpoint.descriptor(file)
            state = None if descriptor is None else residency(descriptor, exact=False)
            warm[file] = state is not None and state.n_cold_bytes <= _MOST_COLD_SHARE * state.n_bytes
        return warm[file]

    rows = tuple(
        row._replace(action=Action.STRIDE) if _can_be_a_view(row) and is_warm(row.spec.region.file) else row
        for row in plan.rows
    )
    return replace(plan, rows=rows) if True in warm.values() else plan


def _can_be_a_view(row: PlanRow) -> bool:
    spec = row.spec
    return (
        row.action is Action.SLICE
        and row.device == "cpu"
        and row.dtype is spec.dtype
        and is_mappable(spec)
        and runs_of(spec, gap_bytes=0).n_bytes >= _LEAST_ROW_BYTES
    )


def place_slices(
    rows: Sequence[PlanRow],
    open_file: Callable[[str], MappedFile],
    existing: Mapping[str, torch.Tensor],
    title: str = "loading",
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Parts whose rows lie apart, by name, and a note on how they were read.

    Args:
        rows: what to do, in the order of the files.
        open_file: path -> the mapped file.
        existing: the module's own tensors, for rows that fill memory that is there.
        title: label of the progress bar.
    """
    cold = {file for file in {row.spec.region.file for row in rows} if not open_file(file).is_warm()}
    placed: dict[str, torch.Tensor] = {}
    pages = HugePages()
    with Progress(title, sum(row.spec.n_bytes for row in rows)) as progress, torch.no_grad():
        for block in _asked_ahead((block for row in rows for block in _blocks(row)), open_file, cold):
            row, spec, box, is_last = block
            file = open_file(spec.region.file)
            if row.fqn not in placed:
                placed[row.fqn] = _memory(row, existing, pages)
            part = placed[row.fqn]
            for dim, (begin, size) in enumerate(zip(box.offset, box.shape, strict=True)):
                part = part.narrow(dim, begin, size)
            part.copy_(file.part(spec))
            if spec.region.file in cold:  # mapping again what is cached costs more than it is worth
                file.release(spec.region)
            if is_last and row.device:
                placed[row.fqn] = placed[row.fqn].to(row.device)
            progress.advance(spec.n_bytes)
    return placed, tuple(_note(rows, cold))


def _memory(row: PlanRow, existing: Mapping[str, torch.Tensor], pages: HugePages) -> torch.Tensor:
    """Where a part shall be: the module's own memory, or new memory."""
    if not row.device:
        return existing[row.fqn]
    shape, n_elements = row.spec.shape, prod(row.spec.shape)
    n_bytes = n_elements * row.dtype.itemsize
    if n_bytes < _LEAST_SLAB_BYTES:
        return torch.empty(shape, dtype=to_torch(row.dtype), device="cpu")
    slab = Slab(n_bytes)
    pages.prepare(slab, 0, n_bytes)
    return slab.tensor(row.dtype, 0, n_elements).view(shape)


def _blocks(row: PlanRow) -> Iterator[_Block]:
    """A part along the dimension of its largest steps; one block of what can only be decoded whole."""
    spec = row.spec
    nothing = (0,) * len(spec.shape)
    stride = (spec.view or StorageView(0, contiguous_stride(spec.shape))).stride
    dim = max(range(len(stride)), key=stride.__getitem__)
    n_rows = spec.shape[dim]
    if spec.region.encoding is not None or not spec.n_bytes:
        yield _Block(row, spec, Box(nothing, spec.shape), True)
        return
    n = max(1, min(_BLOCK_BYTES * n_rows // spec.n_bytes, _SPAN_BYTES // max(1, stride[dim] * spec.dtype.itemsize)))
    for begin in range(0, n_rows, n):
        box = Box(
            (*nothing[:dim], begin, *nothing[dim + 1 :]),
            (*spec.shape[:dim], min(n, n_rows - begin), *spec.shape[dim + 1 :]),
        )
        yield _Block(row, narrow(spec, box), box, begin + n >= n_rows)


def _asked_ahead(blocks: Iterable[_Block], open_file: Callable[[str], MappedFile], cold: set[str]) -> Iterator[_Block]:
    """The blocks, each when the kernel has been asked for it; it is being asked for those behind it meanwhile."""
    if not cold:
        yield from blocks
        return

    def ask(spec: TensorSpec) -> None:
        if spec.region.file in cold and spec.region.encoding is None:
            open_file(spec.region.file).ask_for(runs_of(spec))

    ahead: deque[tuple[_Block, Future[None]]] = deque()
    coming = iter(blocks)
    with ThreadPoolExecutor(_N_THREADS, "fastload-ask") as threads:
        ahead += [(block, threads.submit(ask, block.spec)) for block in islice(coming, _N_AHEAD)]
        while ahead:
            block, asked = ahead.popleft()
            asked.result()
            ahead += [(after, threads.submit(ask, after.spec)) for after in islice(coming, 1)]
            yield block


def _note(rows: Iterable[PlanRow], cold: set[str]) -> Iterator[str]:
    """How the parts of cold files were read; what is warm is not worth a word."""
    runs = [runs_of(row.spec) for row in rows if row.spec.region.file in cold and row.spec.region.encoding is None]
    n_bytes, n_runs = sum(run.n_read_bytes for run in runs), sum(run.n_runs for run in runs)
    if n_runs:
        yield f"cold: {format_bytes(n_bytes)} in {n_runs} runs of rows, asked for without what lies between them"
