"""What splits leave of a tensor, and where that lies in the files."""

from __future__ import annotations

import math

import pytest
import torch

from fastload.dtypes import DTYPES
from fastload.formats.specs import Encoding, Region, StorageView, TensorSpec, contiguous_stride
from fastload.plan.boxes import Box, Split, box_of, joined_of, narrow, narrow_joined
from fastload.plan.fusing import Concatenate, FusedSpec, Stack, join

WEIGHT = TensorSpec("weight", DTYPES["F32"], (6, 10), Region("file", 800, 240))


@pytest.mark.parametrize("n_rows", [1, 7, 999, 1000, 128_256])
def test_a_thousand_ranks_have_the_parts_that_torch_chunk_makes(n_rows: int) -> None:
    chunks = torch.arange(n_rows).chunk(1000)
    boxes = [box_of((n_rows,), [Split(0, 1000, part)]) for part in range(1000)]
    assert [box.shape[0] for box in boxes] == [len(chunk) for chunk in chunks] + [0] * (1000 - len(chunks))
    assert [box.offset[0] for box in boxes[: len(chunks)]] == [int(chunk[0]) for chunk in chunks]


def test_a_split_cuts_what_the_one_before_it_left() -> None:
    assert box_of((7, 3), [Split(0, 2, 1), Split(0, 2, 1)]) == Box((6, 0), (1, 3))


def test_rows_are_a_run_of_the_file() -> None:
    part = narrow(WEIGHT, Box((2, 0), (3, 10)))
    assert part.region == Region("file", 800 + 2 * 40, 3 * 40)
    assert part.view is None


def test_columns_are_a_view_from_their_first_byte_to_their_last() -> None:
    part = narrow(WEIGHT, Box((0, 5), (6, 5)))
    assert part.region == Region("file", 800 + 20, 220)
    assert part.view == StorageView(0, (10, 1))
    assert part.n_bytes == 6 * 5 * 4


def test_columns_of_one_row_are_a_run_of_the_file() -> None:
    assert narrow(WEIGHT, Box((4, 5), (1, 5))).region == Region("file", 800 + 4 * 40 + 20, 20)


def test_a_part_without_elements_has_no_bytes() -> None:
    assert narrow(WEIGHT, Box((6, 0), (0, 10))).region.n_bytes == 0


def test_a_compressed_tensor_is_decoded_whole() -> None:
    region = WEIGHT.region._replace(encoding=Encoding("deflate", 100, None, 1))
    part = narrow(WEIGHT._replace(region=region), Box((2, 0), (3, 10)))
    assert part.region == region
    assert part.view == StorageView(20, (10, 1))


def test_all_of_a_tensor_is_the_tensor() -> None:
    assert narrow(WEIGHT, Box((0, 0), (6, 10))) is WEIGHT


def packed(n_groups: int, n_rows: int) -> torch.Tensor:
    return torch.arange(n_groups * n_rows * 4).reshape(n_groups * n_rows, 4)


@pytest.mark.parametrize("n_rows", [6, 7])
@pytest.mark.parametrize("part", [0, 1])
def test_of_packed_tensors_a_rank_has_a_part_of_each(n_rows: int, part: int) -> None:
    whole = packed(2, n_rows)
    found = joined_of(tuple(whole.shape), Split(0, 2, part), 2, [Split(1, 2, 1)])
    rows = [group.chunk(2)[part][:, 2:] for group in whole.chunk(2)]
    boxes = [whole[a : a + n, b : b + m] for (a, b), (n, m) in found.boxes]
    assert all(torch.equal(box, expected) for box, expected in zip(boxes, rows, strict=True))
    assert found.shape == tuple(torch.cat(rows).shape)


def elements(spec: FusedSpec) -> torch.Tensor:
    """Where each element of a fused tensor of one file is in the file, in elements."""
    where = torch.full((math.prod(spec.shape),), -1)
    for piece in spec.pieces:
        first, stride = piece.spec.view or StorageView(0, contiguous_stride(piece.spec.shape))
        begin = piece.spec.region.offset_bytes // 4 + first
        source = torch.arange(1000).as_strided(piece.spec.shape, stride, begin)
        where.as_strided(piece.spec.shape, piece.stride, piece.offset).copy_(source)
    return where.reshape(spec.shape)


@pytest.mark.parametrize("part", [0, 1])
def test_parts_of_a_packed_tensor_lie_side_by_side(part: int) -> None:
    spec = TensorSpec("packed", DTYPES["F32"], (12, 4), Region("file", 0, 12 * 4 * 4))
    found = narrow_joined(spec, joined_of((12, 4), Split(0, 2, part), 2))
    whole = packed(2, 6)
    assert torch.equal(elements(found), torch.cat([group.chunk(2)[part] for group in whole.chunk(2)]))


@pytest.mark.parametrize("part", [0, 1])
def test_parts_of_pieces_that_are_packed_lie_side_by_side(part: int) -> None:
    specs = [TensorSpec(str(number), DTYPES["F32"], (6, 4), Region("file", number * 96, 96)) for number in range(2 * 3)]
    # Three experts, each a gate above an up.
    whole = join("experts", [specs[0::2], specs[1::2]], Stack(0), Concatenate(1))
    found = narrow_joined(whole, joined_of((3, 12, 4), Split(1, 2, part), 2))
    experts = torch.arange(6 * 24).reshape(3, 12, 4)
    assert torch.equal(elements(found), torch.cat([group.chunk(2, 1)[part] for group in experts.chunk(2, 1)], dim=1))


def test_a_packed_part_without_elements_has_no_bytes() -> None:
    spec = TensorSpec("packed", DTYPES["F32"], (2, 4), Region("file", 0, 32))
    assert narrow_joined(spec, joined_of((2, 4), Split(0, 2, 1), 2)).n_bytes == 0
