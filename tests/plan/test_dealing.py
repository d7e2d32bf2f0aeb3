"""Who of a machine's ranks reads what: every byte that is needed, once, in rounds of limited size."""

from __future__ import annotations

from math import prod

import pytest

from fastload.dtypes import DTYPES
from fastload.formats.specs import Region, TensorSpec
from fastload.plan.boxes import Box, Split, box_in, box_of, inside, narrow, overlap
from fastload.plan.dealing import Round, deal

SHORT = (64, 256)  # columns of it are short runs of the file
LONG = (16, 1 << 17)
MOST_BYTES = 1 << 14


def spec(key: str, shape: tuple[int, ...], at: int = 0) -> TensorSpec:
    return TensorSpec(key, DTYPES["F32"], shape, Region("file", at, prod(shape) * 4))


def whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def read_by(rounds: list[Round], rank: int) -> int:
    return sum(prod(unit.box.shape) * 4 for one in rounds for unit in one[rank])


def check(rounds: list[Round], needs: list[dict[str, Box]], key: str) -> None:
    """Nobody reads a byte twice, and everybody is handed all it needs."""
    units = [unit for one in rounds for units in one for unit in units if unit.key == key]
    for number, unit in enumerate(units):
        assert all(not prod(overlap(unit.box, other.box).shape) for other in units[:number])
        assert all(inside(part, unit.box) for part in unit.wanted.values())
    for rank, need in enumerate(needs):
        handed = [unit.wanted[rank] for unit in units if rank in unit.wanted]
        assert all(inside(part, need[key]) for part in handed)
        assert sum(prod(part.shape) for part in handed) == prod(need[key].shape)


def parts(shape: tuple[int, ...], dim: int, n_parts: int) -> list[Box]:
    return [box_of(shape, [Split(dim, n_parts, part)]) for part in range(n_parts)]


def test_copies_are_read_once_and_in_turns() -> None:
    needs = [{"a": whole(SHORT)}] * 4
    rounds = deal({"a": spec("a", SHORT)}, needs, MOST_BYTES)
    check(rounds, needs, "a")
    assert sum(read_by(rounds, rank) for rank in range(4)) == 64 * 256 * 4
    assert len(rounds) == 1
    assert all(read_by(rounds, rank) == MOST_BYTES for rank in range(4))


@pytest.mark.parametrize("n_parts", [2, 3, 4])
def test_columns_in_short_runs_are_read_as_whole_rows(n_parts: int) -> None:
    needs = [{"a": box} for box in parts(SHORT, 1, n_parts)]
    rounds = deal({"a": spec("a", SHORT)}, needs, MOST_BYTES)
    check(rounds, needs, "a")
    assert all(unit.box.shape[1] == 256 for one in rounds for units in one for unit in units)


@pytest.mark.parametrize(("shape", "dim"), [(SHORT, 0), (LONG, 1)])
def test_rows_and_long_runs_are_left_to_their_rank(shape: tuple[int, ...], dim: int) -> None:
    needs = [{"a": box} for box in parts(shape, dim, 2)]
    assert deal({"a": spec("a", shape)}, needs, MOST_BYTES) == []


def test_what_one_rank_needs_is_left_to_it() -> None:
    assert deal({"a": spec("a", SHORT)}, [{"a": whole(SHORT)}, {}], MOST_BYTES) == []


def test_copies_of_rows_are_read_once_by_those_who_share_them() -> None:
    first, second = parts(SHORT, 0, 2)
    needs = [{"a": first}, {"a": second}, {"a": first}, {"a": second}]
    rounds = deal({"a": spec("a", SHORT)}, needs, MOST_BYTES)
    check(rounds, needs, "a")
    assert {tuple(unit.wanted) for one in rounds for units in one for unit in units} == {(0, 2), (1, 3)}


def test_half_of_the_columns_on_this_machine_are_read_without_the_other_half() -> None:
    needs = [{"a": box} for box in parts(SHORT, 1, 4)[:2]]
    rounds = deal({"a": spec("a", SHORT)}, needs, MOST_BYTES)
    check(rounds, needs, "a")
    assert sum(read_by(rounds, rank) for rank in range(2)) == 64 * 128 * 4


def test_boxes_that_overlap_are_read_as_one() -> None:
    needs = [{"a": Box((0, 0), (40, 256))}, {"a": Box((20, 0), (44, 256))}]
    rounds = deal({"a": spec("a", SHORT)}, needs, MOST_BYTES)
    check(rounds, needs, "a")
    assert sum(read_by(rounds, rank) for rank in range(2)) == 64 * 256 * 4


@pytest.mark.parametrize("most_bytes", [4, 1000, 1 << 20])
def test_a_rank_reads_no_more_than_it_may_in_a_round(most_bytes: int) -> None:
    specs = {name: spec(name, (5, 7, 3), at) for at, name in enumerate("abcdefgh")}
    needs = [{name: whole((5, 7, 3)) for name in specs}] * 3
    rounds = deal(specs, needs, most_bytes)
    for name in specs:
        check(rounds, needs, name)
    assert all(sum(prod(u.box.shape) * 4 for u in units) <= most_bytes for one in rounds for units in one)


def test_scalars_are_handed_over_too() -> None:
    needs = [{"a": Box((), ())}] * 2
    rounds = deal({"a": spec("a", ())}, needs, MOST_BYTES)
    assert [[len(units) for units in one] for one in rounds] == [[1, 0]]


def test_a_part_of_a_file_is_known_by_its_place() -> None:
    tensor = spec("a", (5, 7, 3), 80)
    for box in (Box((1, 2, 0), (3, 4, 2)), whole((5, 7, 3)), Box((4, 6, 2), (1, 1, 1))):
        assert box_in(tensor, narrow(tensor, box)) == box
    assert box_in(tensor, narrow(tensor, Box((5, 0, 0), (0, 7, 3)))).shape == (0, 7, 3)
