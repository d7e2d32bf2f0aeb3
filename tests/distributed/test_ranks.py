"""Models laid out over the ranks of real process groups: each rank loads its own part, and only that."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import fastload
from tests.distributed.groups import Findings, run_group
from tests.distributed.layouts import SHAPE, Net


def write_checkpoints(folder: Path) -> None:
    torch.manual_seed(0)
    fastload.save_model(Net(), folder / "checkpoint")
    fastload.save_model(Net(is_tied=True), folder / "tied")
    fastload.save_model(Net(width=42), folder / "odd")
    fastload.save_state_dict({"experts.weight": torch.randn(SHAPE)}, folder / "one")
    (folder / "view").mkdir()
    torch.save({"experts.weight": torch.randn(SHAPE[::-1]).permute(2, 1, 0)}, folder / "view" / "pytorch_model.bin")
    n_experts, n_rows, n_columns = SHAPE
    halves = {
        f"experts.{number}.{half}": torch.randn(n_rows // 2, n_columns)
        for number in range(n_experts)
        for half in ("gate", "up")
    }
    fastload.save_state_dict(halves, folder / "experts")


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Findings]]:
    """What each rank of a group of so many found; a group runs once for all tests."""

    @cache
    def group(n_ranks: int) -> list[Findings]:
        folder = tmp_path_factory.mktemp("ranks")
        write_checkpoints(folder)
        return run_group("tests.distributed.layouts", n_ranks, folder)

    return group


@pytest.fixture
def ranks(request: pytest.FixtureRequest, groups: Callable[[int], list[Findings]]) -> list[Findings]:
    return groups(request.param)


LAYOUTS = ["tensor parallel", "fully sharded", "tied", "both", "both, uneven", "hybrid"]
SHARDS = [
    "wrong shards",
    "wrong shards in memory",
    "wrong shards of a view",
    "wrong shards of experts",
    "wrong shards of experts in memory",
    "wrong shards of a grid",
]
OF_A_GRID = {"both", "both, uneven", "hybrid", "wrong shards of a grid"}

with_2_and_4_ranks = pytest.mark.parametrize("ranks", [2, 4], indirect=True)


def with_each(names: list[str]) -> pytest.MarkDecorator:
    """Groups of 2 and of 4 ranks with each name; a grid needs 4."""
    cases = [(n_ranks, name) for n_ranks in (2, 4) for name in names if n_ranks == 4 or name not in OF_A_GRID]
    return pytest.mark.parametrize(("ranks", "name"), cases, indirect=["ranks"])


def of(ranks: list[Findings], name: str) -> list[Findings]:
    return [findings[name] for findings in ranks]


@with_each([*LAYOUTS, "converted", "detached"])
def test_every_part_is_the_one_that_torch_makes_of_the_whole_model(ranks: list[Findings], name: str) -> None:
    for found in of(ranks, name):
        assert found["n_laid_out"] > 0
        assert found["differing"] == []
        assert not found["layouts_differ"]


@with_each(LAYOUTS)
def test_outputs_are_those_of_one_process(ranks: list[Findings], name: str) -> None:
    # Sums over ranks are made in another order than in one process.
    assert all(found["error"] < 1e-5 for found in of(ranks, name))


@with_each(LAYOUTS)
def test_a_rank_reads_its_own_bytes_and_reports_them(ranks: list[Findings], name: str) -> None:
    for found in of(ranks, name):
        assert found["n_bytes"] == found["n_owned_bytes"] < found["n_whole_bytes"]
        assert found["is_recorded"]


@with_2_and_4_ranks
def test_ranks_that_share_everything_read_every_byte_once(ranks: list[Findings]) -> None:
    found = of(ranks, "fully sharded")
    assert sum(one["n_bytes"] for one in found) == found[0]["n_whole_bytes"]


@with_2_and_4_ranks
def test_only_parts_whose_rows_lie_apart_are_copied(ranks: list[Findings]) -> None:
    for sharded, parallel in zip(of(ranks, "fully sharded"), of(ranks, "tensor parallel"), strict=True):
        assert set(sharded["actions"]) == {"map"}
        # The weights of the two row-wise layers, by columns.
        assert parallel["actions"]["slice"] == 2 * 24 * 40 * 4 // len(ranks)


@with_2_and_4_ranks
def test_a_parameter_with_two_names_stays_one(ranks: list[Findings]) -> None:
    assert all(found["is_tied"] for found in of(ranks, "tied"))


@with_each(SHARDS)
def test_shards_of_any_dimension_are_those_of_distribute_tensor(ranks: list[Findings], name: str) -> None:
    assert of(ranks, name) == [[]] * len(ranks)


@with_2_and_4_ranks
def test_a_checkpoint_of_another_shape_is_refused(ranks: list[Findings]) -> None:
    for found in of(ranks, "refusals"):
        assert found["shape"].startswith("KeyMatchError")
        assert "shape of blocks.0.up.weight: [40, 24] in the file, [44, 24] in the model" in found["shape"]
        assert found["is_untouched"]


@with_2_and_4_ranks
def test_parts_cannot_arrive_later(ranks: list[Findings]) -> None:
    for found in of(ranks, "refusals"):
        assert found["lazy"].startswith("OptionError: what is laid out over ranks cannot arrive later")


@with_2_and_4_ranks
def test_a_tied_parameter_that_differs_in_the_files_is_refused(ranks: list[Findings]) -> None:
    for found in of(ranks, "refusals"):
        assert found["ties"].startswith("KeyMatchError")
        assert "embed.weight, head.weight" in found["ties"]


@with_2_and_4_ranks
def test_parameters_that_no_file_has_are_named(ranks: list[Findings]) -> None:
    for found in of(ranks, "refusals"):
        assert found["missing"].startswith("IncompleteModelError")
        assert "embed.weight" in found["missing"]
