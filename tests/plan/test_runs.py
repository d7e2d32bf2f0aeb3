"""Where the elements of a strided tensor lie in its file."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastload.dtypes import DTYPES
from fastload.formats.runs import GAP_BYTES, Runs, asked_bytes, runs_of
from fastload.formats.specs import Encoding, Region, StorageView, TensorSpec
from fastload.plan.boxes import Box, narrow

WHOLE = TensorSpec("weight", DTYPES["F32"], (4, 6, 8), Region("file", 800, 4 * 6 * 8 * 4))


def read(runs: Runs, data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor, from its runs laid one after another, as bytes 800 and on of a file have it."""
    laid = [data[at - 800 : at - 800 + runs.n_bytes] for at in runs.offsets()]
    storage = torch.cat(laid).view(torch.float32) if laid and runs.n_bytes else torch.empty(0)
    return storage.as_strided(spec.shape, runs.stride)


@pytest.mark.parametrize("gap_bytes", [0, 8, 40, 10_000])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_runs_have_every_element_of_any_box_of_any_view(order: tuple[int, ...], gap_bytes: int) -> None:
    elements = torch.arange(4 * 6 * 8, dtype=torch.float32)
    data = elements.view(torch.uint8)
    view = elements.view(WHOLE.shape).permute(order)
    whole = WHOLE._replace(shape=tuple(view.shape), view=StorageView(0, view.stride()))
    for begins in itertools.product((0, 1), repeat=3):
        for lost in itertools.product((0, 1, 3), repeat=3):
            shape = tuple(max(1, n - b - k) for n, b, k in zip(view.shape, begins, lost, strict=True))
            spec = narrow(whole, Box(begins, shape))
            runs = runs_of(spec, gap_bytes)
            expected = view[tuple(slice(b, b + n) for b, n in zip(begins, shape, strict=True))]
            assert torch.equal(read(runs, data, spec), expected)
            assert list(runs.offsets()) == sorted(runs.offsets())
            assert runs.n_read_bytes >= spec.n_bytes
            if gap_bytes == 0:
                assert runs.n_read_bytes == spec.n_bytes


def test_columns_are_a_run_a_row() -> None:
    matrix = WHOLE._replace(shape=(100, 4096), region=Region("file", 80, 100 * 4096 * 4))
    runs = runs_of(narrow(matrix, Box((0, 1024), (100, 1024))))
    assert (runs.n_runs, runs.n_bytes, runs.steps_bytes) == (100, 4096, (16384,))
    assert next(runs.offsets()) == 80 + 4096


def test_columns_of_a_stack_of_matrices_are_one_sequence_of_runs() -> None:
    stack = WHOLE._replace(shape=(5, 100, 4096), region=Region("file", 80, 5 * 100 * 4096 * 4))
    runs = runs_of(narrow(stack, Box((0, 0, 1024), (5, 100, 1024))))
    assert (runs.counts, runs.steps_bytes) == ((500,), (16384,))


def test_runs_with_less_than_a_page_between_them_are_one() -> None:
    matrix = WHOLE._replace(shape=(100, 1024), region=Region("file", 0, 100 * 1024 * 4))
    runs = runs_of(narrow(matrix, Box((0, 0), (100, 512))))
    assert (runs.n_runs, runs.n_bytes) == (1, 99 * 4096 + 2048)
    assert GAP_BYTES >= (1024 - 512) * 4


def test_a_tensor_without_elements_has_no_bytes() -> None:
    assert runs_of(WHOLE._replace(shape=(4, 0, 8))).n_read_bytes == 0


def test_what_is_compressed_is_asked_for_whole() -> None:
    region = WHOLE.region._replace(encoding=Encoding("deflate", 100, None, 1))
    assert asked_bytes(narrow(WHOLE._replace(region=region), Box((0, 0, 0), (4, 6, 1)))) == 100
