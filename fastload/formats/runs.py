"""How the elements of a strided tensor lie in its file: runs of bytes, at regular distances.

Pure. A rank's columns of a matrix are one run for each row. Storage gives whole pages, so that runs with less than a
page between them are one, read with what lies between; all others are asked for alone. Measured cold on a local disk,
a quarter of each row: for rows of 28 kB and more that takes a half to a quarter of the time of reading all of them, and
for rows of 8 kB no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import NamedTuple

from fastload.formats.specs import StorageView, TensorSpec, contiguous_stride

__all__ = ["GAP_BYTES", "Runs", "asked_bytes", "runs_of"]

GAP_BYTES = 4096 - 1
"""What is read over rather than left out between two runs."""


class Runs(NamedTuple):
    """The bytes of a strided tensor in its file.

    Attributes:
        offset_bytes: where the first run begins.
        n_bytes: of each run.
        counts: how often runs repeat, along each dimension of their grid.
        steps_bytes: the distance from one to the next along each.
        stride: of the tensor's dimensions where its runs are laid one after another, in elements.
    """

    offset_bytes: int
    n_bytes: int
    counts: tuple[int, ...]
    steps_bytes: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def n_runs(self) -> int:
        """How many there are."""
        return prod(self.counts)

    @property
    def n_read_bytes(self) -> int:
        """Bytes of all runs, with what lies between elements within a run."""
        return self.n_runs * self.n_bytes

    def offsets(self) -> Iterator[int]:
        """Where each run begins in the file, in ascending order."""
        if len(self.counts) == 1:
            (count,), (step,) = self.counts, self.steps_bytes
            yield from range(self.offset_bytes, self.offset_bytes + count * step, step)
            return
        grid = (range(0, count * step, step) for count, step in zip(self.counts, self.steps_bytes, strict=True))
        for steps in product(*grid):
            yield self.offset_bytes + sum(steps)


def runs_of(spec: TensorSpec, gap_bytes: int = GAP_BYTES) -> Runs:
    """The runs of a tensor that is kept as it is in its file.

    Args:
        spec: which one; not encoded.
        gap_bytes: most that may lie between two runs for both to be one.
    """
    itemsize = spec.dtype.itemsize
    first, stride = spec.view or StorageView(0, contiguous_stride(spec.shape))
    begin = spec.region.offset_bytes + first * itemsize
    if not prod(spec.shape):
        return Runs(begin, 0, (), (), stride)
    n_elements = 1  # of a run: from its first to its last
    packed = list(stride)
    counts: list[int] = []
    steps: list[int] = []
    # From the smallest step to the largest, whatever the order of the dimensions is.
    for step, size, dim in sorted(zip(stride, spec.shape, range(len(stride)), strict=True)):
        if size == 1:
            continue
        if counts and step == counts[0] * steps[0]:
            packed[dim] = n_elements * prod(counts)
            counts[0] *= size
        elif not counts and (step - n_elements) * itemsize <= gap_bytes:
            n_elements += (size - 1) * step
        else:
            packed[dim] = n_elements * prod(counts)
            counts.insert(0, size)
            steps.insert(0, step)
    return Runs(begin, n_elements * itemsize, tuple(counts), tuple(step * itemsize for step in steps), tuple(packed))


def asked_bytes(spec: TensorSpec) -> int:
    """Bytes that storage is asked for to have a tensor: its runs, or all that its encoding takes in the file."""
    encoding = spec.region.encoding
    if encoding is not None:
        return encoding.n_bytes
    return spec.region.n_bytes if spec.view is None else runs_of(spec).n_read_bytes
