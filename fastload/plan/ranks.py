"""What each of many ranks would read of a checkpoint, counted on one machine and without a process group.

Pure: a layout is tensor parallelism within groups of ranks (see `plan.tensor_parallel`) and, over what that leaves,
`fully_shard` over the groups, as a two-dimensional device mesh (groups, ranks of a group) has it. Ranks are counted one
by one; tensors of one shape that are cut alike are counted once and multiplied, since models repeat their blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fastload.errors import OptionError
from fastload.formats.runs import runs_of
from fastload.formats.specs import TensorSpec
from fastload.plan.boxes import Box, Split, box_of, narrow, narrow_fused
from fastload.plan.fusing import FusedSpec
from fastload.plan.rows import LoadPlan
from fastload.plan.slots import Slot
from fastload.plan.tensor_parallel import TensorParallelPlan, splits_of

__all__ = ["Layout", "Reads", "count_reads"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is laid out over ranks.

    Attributes:
        n_ranks: all of them.
        n_tensor_parallel: ranks that split every layer among them; 1 for none. They have consecutive numbers.
        tensor_parallel: how they split; not asked for where there is one.
    """

    n_ranks: int
    n_tensor_parallel: int = 1
    tensor_parallel: TensorParallelPlan = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n_ranks < 1 or self.n_tensor_parallel < 1 or self.n_ranks % self.n_tensor_parallel:
            raise OptionError(
                "so many ranks are no whole number of groups",
                expected=f"a multiple of {self.n_tensor_parallel}",
                found=self.n_ranks,
                fix="choose a number of ranks that the size of the tensor parallel groups divides",
            )

    def splits(self, fqn: str, shape: tuple[int, ...], rank: int) -> tuple[Split, ...]:
        """The cuts that leave a rank its part of a parameter, in the order in which they are made."""
        group, part = divmod(rank, self.n_tensor_parallel)
        cuts: tuple[Split, ...] = ()
        if self.n_tensor_parallel > 1:
            cuts = splits_of(self.tensor_parallel, fqn, shape, self.n_tensor_parallel, part)
        n_groups = self.n_ranks // self.n_tensor_parallel
        if n_groups == 1 or not shape:
            return cuts
        return (*cuts, Split(_fully_sharded_dim(box_of(shape, cuts).shape, n_groups), n_groups, group))


def _fully_sharded_dim(shape: tuple[int, ...], n_groups: int) -> int:
    """The dimension by which fully_shard cuts a parameter: the first, unless that would leave groups without any.

    Then the first that the number of groups divides, as torchtitan's ``shard_placement_fn`` does for few experts among
    many ranks.
    """
    even = (dim for dim, size in enumerate(shape) if size % n_groups == 0)
    return 0 if shape[0] >= n_groups else next(even, 0)


class Reads(NamedTuple):
    """What a rank, or a node of several, reads of the weights.

    Attributes:
        n_bytes: bytes in the files of what it owns; what several ranks of a node own counts once.
        n_read_bytes: bytes that it asks storage for: with what lies between runs that are read as one.
        n_runs: runs of bytes that lie apart.
        n_files: files that have any of it.
    """

    n_bytes: int
    n_read_bytes: int
    n_runs: int
    n_files: int


@dataclass(slots=True)
class _Alike:
    """Tensors that are cut alike: the first stands for all."""

    fqn: str
    shape: tuple[int, ...]
    spec: TensorSpec | FusedSpec
    n: int = 0
    files: set[str] = field(default_factory=set)


def count_reads(plan: LoadPlan, slots: Mapping[str, Slot], layout: Layout, n_together: int = 1) -> list[Reads]:
    """What each rank reads, or each node.

    Args:
        plan: of the whole model, as one process would load it.
        slots: the model's tensors by name.
        layout: how it is laid out.
        n_together: ranks of a node, if what a node reads is asked for.

    Raises:
        OptionError: the plan of the layout has a style that is not known.
    """
    kinds = list(_kinds(plan, slots, layout))
    nodes = [range(layout.n_ranks)[first : first + n_together] for first in range(0, layout.n_ranks, n_together)]
    return [_reads_of(kinds, layout, node) for node in nodes]


def _kinds(plan: LoadPlan, slots: Mapping[str, Slot], layout: Layout) -> Iterable[_Alike]:
    found: dict[object, _Alike] = {}
    for row in plan.all_rows:
        spec, shape = row.spec, slots[row.fqn].shape
        if isinstance(spec, FusedSpec):
            form: object = tuple((piece.spec[1:3], piece.offset, piece.stride) for piece in spec.pieces)
            files = {piece.spec.region.file for piece in spec.pieces}
        else:
            form = (spec.dtype, spec.view, spec.region.encoding and row.fqn)
            files = {spec.region.file}
        alike = found.setdefault((shape, form, layout.splits(row.fqn, shape, 0)), _Alike(row.fqn, shape, spec))
        alike.n += 1
        alike.files |= files
    return found.values()


def _reads_of(kinds: Iterable[_Alike], layout: Layout, ranks: Iterable[int]) -> Reads:
    n_bytes = n_read_bytes = n_runs = 0
    files: set[str] = set()
    for kind in kinds:
        boxes = {box_of(kind.shape, layout.splits(kind.fqn, kind.shape, rank)) for rank in ranks}
        for part in (part for box in boxes for part in _parts(kind.spec, box)):
            if not part.n_bytes:
                continue
            n_bytes += kind.n * part.n_bytes
            if part.region.encoding is not None:
                n_read_bytes += kind.n * part.region.encoding.n_bytes
                n_runs += kind.n
            else:
                runs = runs_of(part)
                n_read_bytes += kind.n * runs.n_read_bytes
                n_runs += kind.n * runs.n_runs
            files |= kind.files
    return Reads(n_bytes, n_read_bytes, n_runs, len(files))


def _parts(spec: TensorSpec | FusedSpec, box: Box) -> list[TensorSpec]:
    """What a box of a tensor of the model is in the files."""
    if isinstance(spec, FusedSpec):
        return [piece.spec for piece in narrow_fused(spec, box).pieces]
    return [narrow(spec, box)]
