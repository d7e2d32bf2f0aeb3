"""What many ranks would read, counted without them."""

from __future__ import annotations

from math import prod

import pytest
import torch

from fastload.dtypes import DTYPES
from fastload.errors import OptionError
from fastload.formats.specs import Region, TensorSpec
from fastload.options import LoadOptions
from fastload.plan.boxes import box_of
from fastload.plan.fusing import Fusion, Stack
from fastload.plan.keys import KeyRules
from fastload.plan.planning import plan_model
from fastload.plan.ranks import Layout, Reads, count_reads
from fastload.plan.slots import Slot

PLAN = {"layers.*.up": "colwise", "layers.*.down": "rowwise", "experts": "experts"}
SHAPES = {
    **{f"layers.{n}.up.weight": (24, 4096) for n in range(3)},
    **{f"layers.{n}.up.bias": (24,) for n in range(3)},
    **{f"layers.{n}.down.weight": (10, 24_576) for n in range(3)},
    **{f"layers.{n}.down.bias": (10,) for n in range(3)},
    "experts.weight": (6, 5, 7),
    "norm.weight": (8,),
}
N_BYTES = 4 * sum(map(prod, SHAPES.values()))


def counted(n_ranks: int, n_tensor_parallel: int = 1, n_together: int = 1) -> list[Reads]:
    """A layer in a file of its own, everything else in one more; the experts are kept one by one."""
    shapes = {name: shape for name, shape in SHAPES.items() if name != "experts.weight"}
    shapes |= {f"experts.{number}.weight": SHAPES["experts.weight"][1:] for number in range(6)}
    specs, ends = {}, dict.fromkeys("012x", 0)
    for key, shape in shapes.items():
        file = key.split(".")[1] if key.startswith("layers.") else "x"
        n_bytes = 4 * prod(shape)
        specs[key] = TensorSpec(key, DTYPES["F32"], shape, Region(file, ends[file], n_bytes))
        ends[file] += n_bytes
    slots = {fqn: Slot(fqn, DTYPES["F32"], shape) for fqn, shape in SHAPES.items()}
    rules = KeyRules(fusions=(Fusion(("experts.*.weight",), "experts.weight", (Stack(0),)),))
    plan = plan_model(specs, slots, LoadOptions(), rules, "folder")
    return count_reads(plan, slots, Layout(n_ranks, n_tensor_parallel, PLAN), n_together)


def chunk(tensor: torch.Tensor, n_parts: int, part: int, dim: int) -> torch.Tensor:
    parts = tensor.chunk(n_parts, dim)
    return parts[part] if part < len(parts) else tensor.narrow(dim, 0, 0)


def owned(rank: int, n_ranks: int, n_tensor_parallel: int) -> int:
    """Bytes that a rank owns, as torch cuts tensors."""
    group, place = divmod(rank, n_tensor_parallel)
    n_elements = 0
    for fqn, shape in SHAPES.items():
        tensor = torch.empty(shape, device="meta")
        if ".up." in fqn or fqn.startswith("experts"):
            tensor = chunk(tensor, n_tensor_parallel, place, 0)
        elif fqn.endswith("down.weight"):
            tensor = chunk(tensor, n_tensor_parallel, place, 1)
        n_elements += chunk(tensor, n_ranks // n_tensor_parallel, group, 0).numel()
    return 4 * n_elements


@pytest.mark.parametrize(("n_ranks", "n_tensor_parallel"), [(1, 1), (4, 4), (4, 1), (8, 2), (12, 3), (61, 1)])
def test_every_rank_owns_what_torch_would_give_it(n_ranks: int, n_tensor_parallel: int) -> None:
    found = [rank.n_bytes for rank in counted(n_ranks, n_tensor_parallel)]
    assert found == [owned(rank, n_ranks, n_tensor_parallel) for rank in range(n_ranks)]


def test_one_rank_reads_all_in_a_run_for_each_tensor() -> None:
    assert counted(1) == [Reads(N_BYTES, N_BYTES, len(SHAPES) - 1 + 6, 4)]


def test_columns_of_a_matrix_are_a_run_for_each_row() -> None:
    for rank in counted(2, 2):
        # Of each layer ten rows of a matrix, and three tensors in one run; three experts of six; the norm.
        assert rank.n_runs == 3 * (10 + 3) + 3 + 1
        assert rank.n_read_bytes == rank.n_bytes


def test_a_node_reads_what_its_ranks_share_once() -> None:
    assert counted(4, 4, n_together=4) == [Reads(N_BYTES, N_BYTES, 3 * (4 * 10 + 4 + 4 + 1) + 6 + 1, 4)]
    assert sum(rank.n_bytes for rank in counted(4, 4)) > N_BYTES
    halves = counted(8, 4, n_together=4)
    assert sum(node.n_bytes for node in halves) == N_BYTES


def test_ranks_that_are_left_nothing_read_nothing() -> None:
    found = counted(61)
    assert found[-1].n_bytes == 0
    assert found[-1].n_files == 0


def test_too_few_experts_for_all_groups_are_cut_by_another_dimension() -> None:
    shape = SHAPES["experts.weight"]
    layout = Layout(20, 4, PLAN)
    boxes = [box_of(shape, layout.splits("experts.weight", shape, rank)) for rank in range(20)]
    assert {box.shape for box in boxes} == {(2, 1, 7), (0, 5, 7)}
    assert len({box for box in boxes if prod(box.shape)}) == 15


@pytest.mark.parametrize(("n_ranks", "n_tensor_parallel"), [(8, 3), (2, 4), (0, 1)])
def test_ranks_that_are_no_whole_number_of_groups_are_refused(n_ranks: int, n_tensor_parallel: int) -> None:
    with pytest.raises(OptionError, match="no whole number of groups"):
        Layout(n_ranks, n_tensor_parallel)
