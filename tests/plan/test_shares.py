"""Who writes what of a checkpoint that ranks hold together: every byte once, and evenly."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fastload.errors import OptionError
from fastload.formats.specs import StorageView
from fastload.plan.boxes import Box, box_of_view
from fastload.plan.shares import Block, Held, Share, assemble, runs, share_blocks, share_out

MIB = 1 << 20


def held(shape: tuple[int, ...], begin: tuple[int, ...], size: tuple[int, ...], memory: int | None = 0) -> Held:
    return Held("float32", 4, shape, (Box(begin, size),), True, memory)


def plain(shape: tuple[int, ...], memory: int | None = 0, dtype: str = "float32") -> Held:
    return Held(dtype, 4, shape, (Box((0,) * len(shape), shape),), False, memory)


def boxes_in(shape: tuple[int, ...]) -> list[Box]:
    ranges = [[(begin, end) for begin in range(size) for end in range(begin + 1, size + 1)] for size in shape]
    return [
        Box(tuple(begin for begin, _ in sides), tuple(end - begin for begin, end in sides))
        for sides in product(*ranges)
    ]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (1, 3, 1, 2)])
def test_runs_are_the_bytes_of_a_box_in_the_order_of_its_elements(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for box in boxes_in(shape):
        part = numbers[tuple(slice(begin, begin + n) for begin, n in zip(box.offset, box.shape, strict=True))]
        found = [n // 2 for begin, n_bytes in runs(shape, box, 2) for n in range(begin, begin + n_bytes, 2)]
        assert found == part.reshape(-1).tolist()


def test_a_box_of_whole_rows_is_one_run() -> None:
    assert [*runs((8, 3, 2), Box((2, 0, 0), (4, 3, 2)), 4)] == [(48, 96)]
    assert [*runs((8, 3, 2), Box((2, 1, 0), (1, 2, 2)), 4)] == [(56, 16)]


def test_an_empty_box_has_no_runs() -> None:
    assert [*runs((4, 3), Box((4, 0), (0, 3)), 4)] == []


def test_parts_are_assembled_in_the_order_of_the_first_rank() -> None:
    first = {"b": held((4, 2), (0, 0), (2, 2)), "a": plain((3,))}
    second = {"a": plain((3,)), "b": held((4, 2), (2, 0), (2, 2)), "c": plain((1,))}
    wholes = assemble([first, second])
    assert [*wholes] == ["b", "a", "c"]
    assert wholes["b"].ranks_of == {Box((0, 0), (2, 2)): [0], Box((2, 0), (2, 2)): [1]}
    assert wholes["a"].ranks_of == {Box((0,), (3,)): [0]}
    assert wholes["c"].ranks_of == {Box((0,), (1,)): [1]}


def test_tensors_are_one_if_they_are_the_same_memory_on_every_rank() -> None:
    halves = [((0,), (2,)), ((2,), (2,))]
    ranks = [{key: held((4,), *half, memory=number) for key in "ab"} for number, half in enumerate(halves)]
    ranks[0] |= {"c": held((4,), *halves[0], memory=0)}
    ranks[1] |= {"c": held((4,), *halves[1], memory=7)}
    wholes = assemble(ranks)
    assert wholes["a"].memory == wholes["b"].memory != wholes["c"].memory


def test_a_rank_with_no_part_has_no_say_in_what_is_the_same_memory() -> None:
    ranks = [{key: held((1,), (0,), (1,), 5) for key in "ab"}, {key: held((1,), (1,), (0,), None) for key in "ab"}]
    wholes = assemble(ranks)
    assert wholes["a"].memory == wholes["b"].memory is not None


def test_tensors_without_elements_are_not_the_same_memory() -> None:
    assert assemble([{"a": plain((0,), None)}])["a"].memory is None


@pytest.mark.parametrize("other", [plain((4,), dtype="int32"), plain((5,)), held((4,), (0,), (4,))])
def test_ranks_that_do_not_agree_on_a_tensor_are_refused(other: Held) -> None:
    with pytest.raises(OptionError, match=r"different tensors under one name(.|\n)*on rank 1"):
        assemble([{"a": plain((4,))}, {"a": other}])


def test_parts_that_are_not_the_whole_are_refused() -> None:
    with pytest.raises(OptionError, match=r"do not have all of a tensor(.|\n)*parts of 3"):
        assemble([{"a": held((4,), (0,), (2,))}, {"a": held((4,), (3,), (1,))}])


def covered(shares: list[list[Share]], key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """How often each element of a tensor is written."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for own in shares:
        for name, box in own:
            if name == key:
                counts[tuple(slice(b, b + n) for b, n in zip(box.offset, box.shape, strict=True))] += 1
    return counts


def test_every_element_is_written_once() -> None:
    shape = (7, 3 * MIB)  # 84 MiB: in slabs
    of_both = {"all": held(shape, (0, 0), shape), "scalar": held((), (), ())}
    ranks = [
        of_both | {"half": held((4, 2), (0, 0), (2, 2))},
        of_both | {"half": held((4, 2), (2, 0), (2, 2))},
    ]
    shares = share_out(assemble(ranks), 2)
    assert (covered(shares, "half", (4, 2)) == 1).all()
    assert (covered(shares, "scalar", ()) == 1).all()
    rows = covered(
        [[Share(key, Box(b[:1], n[:1])) for key, (b, n) in own if key == "all"] for own in shares], "all", (7,)
    )
    assert (rows == 1).all()


def test_what_many_ranks_have_is_spread_over_those_that_have_the_least() -> None:
    shape = (64, MIB)
    busy = {"own": held((24 * MIB,), (0,), (24 * MIB,))}
    wholes = assemble([{"all": held(shape, (0, 0), shape)} | (busy if rank == 0 else {}) for rank in range(4)])
    shares = share_out(wholes, 4)
    n_bytes = [sum(4 * torch.Size(box.shape).numel() for _, box in own) for own in shares]
    assert sum(n_bytes) == (256 + 96) * MIB
    assert max(n_bytes) - min(n_bytes) <= 24 * MIB


def test_a_block_is_read_by_a_rank_that_writes_into_it() -> None:
    # Columns: both ranks write into both blocks; then rows: one block each.
    columns = [held((8, 4), (0, 2 * rank), (8, 2)) for rank in range(2)]
    rows = [held((8, 4), (4 * rank, 0), (4, 4)) for rank in range(2)]
    wholes = assemble([{"columns": columns[rank], "rows": rows[rank]} for rank in range(2)])
    shares = share_out(wholes, 2)
    blocks = [Block(key, begin, 64) for key in wholes for begin in (0, 64)]
    numbers = share_blocks(blocks, wholes, shares, 64)
    assert sorted(numbers[0] + numbers[1]) == [0, 1, 2, 3]
    assert (2 in numbers[0], 3 in numbers[1]) == (True, True)
    assert len(numbers[0]) == len(numbers[1])


SHAPE = (4, 6, 5)
VIEWS = {
    "one of a stack": lambda tensor: tensor[2],
    "half": lambda tensor: tensor.chunk(2, dim=1)[1],
    "half of one": lambda tensor: tensor.chunk(2, dim=1)[1].unbind()[3],
    "turned": lambda tensor: tensor.permute(2, 0, 1),
    "one column, turned": lambda tensor: tensor[:, :, 3].t(),
    "with a dimension more": lambda tensor: tensor[1:3].unsqueeze(1),
    "one element": lambda tensor: tensor[1, 2, 3:4],
    "all": lambda tensor: tensor,
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_a_box_has_the_elements_that_both_have(name: str) -> None:
    whole = torch.arange(torch.Size(SHAPE).numel()).reshape(SHAPE)
    view = VIEWS[name](whole)
    storage_view = StorageView(view.storage_offset(), view.stride())
    for box in boxes_in(SHAPE)[::29]:
        found = box_of_view(SHAPE, box, tuple(view.shape), storage_view)
        assert found is not None
        of_view, inner, dims = found
        inside = view[tuple(slice(b, b + n) for b, n in zip(of_view.offset, of_view.shape, strict=True))]
        part = whole[tuple(slice(b, b + n) for b, n in zip(inner.offset, inner.shape, strict=True))]
        own = whole[tuple(slice(b, b + n) for b, n in zip(box.offset, box.shape, strict=True))]
        assert sorted(inside.flatten().tolist()) == sorted(part.flatten().tolist())
        assert {*inside.flatten().tolist()} == {*view.flatten().tolist()} & {*own.flatten().tolist()}
        along = [dim for dim in dims if dim is not None]
        rest = [dim for dim in range(len(SHAPE)) if dim not in along]
        assert torch.equal(part.permute(*along, *rest).reshape(inside.shape), inside)


NO_BOXES = {
    "diagonal": lambda tensor: tensor.diagonal(),
    "flat": lambda tensor: tensor.flatten(),
    "every other": lambda tensor: tensor[:, ::2],
    "repeated": lambda tensor: tensor.expand(2, 4, 6, 5),
    "scalar": lambda tensor: tensor[1, 2, 3],
}


@pytest.mark.parametrize("name", NO_BOXES)
def test_a_view_that_is_no_box_is_seen(name: str) -> None:
    view = NO_BOXES[name](torch.empty(SHAPE))
    found = box_of_view(SHAPE, Box((0, 0, 0), SHAPE), tuple(view.shape), StorageView(0, view.stride()))
    assert found is None
