"""Checkpoints that all ranks of a process group write together: the same, to the byte, as those of one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastload
from fastload.errors import OptionError
from tests.distributed.groups import Findings, run_group
from tests.distributed.layouts import Net


class Saved(NamedTuple):
    """Where a group saved to, and what each rank found."""

    folder: Path
    ranks: list[Findings]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Saved]:
    """What a group of so many ranks saved; it runs once for all tests."""

    @cache
    def group(n_ranks: int) -> Saved:
        folder = tmp_path_factory.mktemp("saves")
        if n_ranks == 2:  # which loads what four ranks have saved
            (folder / "of four").symlink_to(group(4).folder / "together")
        return Saved(folder, run_group("tests.distributed.saves", n_ranks, folder))

    return group


@pytest.fixture
def saved(request: pytest.FixtureRequest, groups: Callable[[int], Saved]) -> Saved:
    return groups(request.param)


OF_A_GRID = ["both", "hybrid", "inner mesh"]
EXPERTS = [f"experts by dimension {dim}" for dim in range(3)]
MODELS = [*EXPERTS, "a module"]
SAVES = [
    "tensor parallel",
    "fully sharded",
    "tied",
    *OF_A_GRID,
    "in shards",
    "types",
    "types in shards",
    "large",
    "packed",
]

with_2_and_4_ranks = pytest.mark.parametrize("saved", [2, 4], indirect=True)
with_4_ranks = pytest.mark.parametrize("saved", [4], indirect=True)


def with_each(names: list[str]) -> pytest.MarkDecorator:
    cases = [(n_ranks, name) for n_ranks in (2, 4) for name in names if n_ranks == 4 or name not in OF_A_GRID]
    return pytest.mark.parametrize(("saved", "name"), cases, indirect=["saved"])


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@with_each([*SAVES, *MODELS])
def test_the_files_are_those_that_one_process_writes(saved: Saved, name: str) -> None:
    alone = contents(saved.folder / "alone" / name)
    assert alone
    assert contents(saved.folder / "together" / name) == alone


@pytest.mark.parametrize("saved", [2], indirect=True)
@pytest.mark.parametrize("name", ["of four, tensor parallel", "of four, fully sharded"])
def test_two_ranks_load_what_four_have_saved(saved: Saved, name: str) -> None:
    assert [rank[name] for rank in saved.ranks] == [[], []]


@with_each([*SAVES, *MODELS])
def test_every_rank_gets_the_report_of_the_whole_save(saved: Saved, name: str) -> None:
    reports = [rank[name]["report"] for rank in saved.ranks]
    names = os.listdir(saved.folder / "together" / name)
    for report in reports:
        assert sorted(report["files"]) == sorted(names)
        assert {**report, "seconds": 0} == {**reports[0], "seconds": 0}


@with_each(SAVES)
def test_every_byte_of_the_tensors_is_written_once(saved: Saved, name: str) -> None:
    files = [*(saved.folder / "together" / name).iterdir()]
    n_told = sum(rank[name]["n_told"] for rank in saved.ranks)
    # The journal of the commit is written as well: two names of each file.
    assert 0 < n_told - sum(path.stat().st_size for path in files) < 300 * len(files)


@with_2_and_4_ranks
def test_what_ranks_have_in_common_is_written_by_all_of_them(saved: Saved) -> None:
    n_told = [rank["large"]["n_told"] for rank in saved.ranks]
    assert max(n_told) - min(n_told) < 20 << 20  # a slab of 16 MiB more or less
    assert all(rank["large"]["n_told"] < rank["large"]["n_here"] for rank in saved.ranks)


@with_2_and_4_ranks
def test_checksums_are_of_what_the_ranks_wrote(saved: Saved) -> None:
    tensors = fastload.load_state_dict(saved.folder / "together" / "large", verify=True)
    assert sum(tensor.nbytes for tensor in tensors.values()) == saved.ranks[0]["large"]["report"]["n_bytes"]


@with_2_and_4_ranks
def test_parts_on_a_device_are_copied_out_through_pinned_memory(saved: Saved) -> None:
    assert contents(saved.folder / "together" / "from a device") == contents(saved.folder / "alone" / "from a device")
    assert all(0 < rank["from a device"]["n_pins"] <= 4 for rank in saved.ranks)


def test_a_part_that_is_not_contiguous_is_not_copied_as_a_whole(groups: Callable[[int], Saved]) -> None:
    saved = groups(2)
    assert contents(saved.folder / "together" / "turned") == contents(saved.folder / "alone" / "turned")
    for found in [rank["turned"] for rank in saved.ranks]:
        assert found["n_looked_at"] > 0
        assert found["n_more"] < found["n_here"] == 64 << 20


@with_4_ranks
def test_what_four_ranks_saved_loads_in_one_process(saved: Saved) -> None:
    net, expected = Net(width=42), Net(width=42)
    fastload.load_model(net, saved.folder / "together" / "both")
    fastload.load_model(expected, saved.folder / "alone" / "both")
    for (name, tensor), (_, other) in zip(net.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.fixture
def only_rank(tmp_path: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors laid out over a process group of this process alone."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield {"a": distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (1,)), [Shard(0)])}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_group_of_one_saves_as_a_process_without_a_group(only_rank: dict[str, torch.Tensor], tmp_path: Path) -> None:
    fastload.save_state_dict(only_rank, tmp_path / "together")
    fastload.save_state_dict({"a": torch.arange(6.0)}, tmp_path / "alone")
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_without_a_process_group_nothing_is_saved(only_rank: dict[str, torch.Tensor], tmp_path: Path) -> None:
    dist.destroy_process_group()
    with pytest.raises(OptionError, match="there is no process group"):
        fastload.save_state_dict(only_rank, tmp_path / "out")
    assert not (tmp_path / "out").exists()
