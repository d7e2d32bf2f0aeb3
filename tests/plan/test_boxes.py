"""What splits leave of a tensor, and where that lies in the files."""

from __future__ import annotations

import pytest
import torch

from fastload.dtypes import DTYPES
from fastload.formats.specs import Encoding, Region, StorageView, TensorSpec
from fastload.plan.boxes import Box, Split, box_of, narrow

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
