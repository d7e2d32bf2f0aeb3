"""Plans for devices are data: made and checked here without a file or a device."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.dtypes import DTYPES, DType
from fastload.errors import OptionError
from fastload.formats.chunks import Part
from fastload.formats.specs import Encoding, Region, StorageView, TensorSpec, contiguous_stride
from fastload.plan.fusing import FusedSpec, Piece
from fastload.plan.rows import Action, FusedRow, PlanRow
from fastload.plan.staging import Limits, StagingPlan, Wanted, can_be_staged, plan_staging, wanted_of

PAGE = 4096
F32, BF16, I64, F16 = DTYPES["F32"], DTYPES["BF16"], DTYPES["I64"], DTYPES["F16"]
SMALL = Limits(chunk_bytes=4 * PAGE, alone_bytes=4 * PAGE, buffer_bytes=16 * PAGE)


def spec(key: str, offset: int, shape: tuple[int, ...], dtype: DType = F32, file: str = "a") -> TensorSpec:
    return TensorSpec(key, dtype, shape, Region(file, offset, prod(shape) * dtype.itemsize))


def row(found: TensorSpec, dtype: DType | None = None) -> PlanRow:
    return PlanRow(found.key, found, dtype or found.dtype, "cuda:0", Action.MOVE)


def side_by_side(n: int, shape: tuple[int, ...], dtype: DType = F32) -> list[PlanRow]:
    size = prod(shape) * dtype.itemsize
    return [row(spec(f"t{i}", 96 + i * size, shape, dtype)) for i in range(n)]


def parts(plan: StagingPlan) -> list[Part]:
    return [part for chunk in plan.chunks for part in chunk.parts]


def test_neighbours_of_one_type_are_one_copy() -> None:
    plan = plan_staging(wanted_of(side_by_side(20, (8, 4))), SMALL)
    assert [part.n_bytes for part in parts(plan)] == [20 * 128]
    assert plan.buffers == (20 * 128,)


def test_neighbours_of_one_type_are_converted_as_one() -> None:
    rows = [row(one.spec, BF16) for one in side_by_side(20, (8, 4))]
    plan = plan_staging(wanted_of(rows), SMALL)
    assert [(part.n_bytes, part.source, part.dtype) for part in parts(plan)] == [(20 * 128, F32, BF16)]
    assert (plan.buffers, plan.scratch_bytes) == ((20 * 64,), 20 * 128)


def test_a_neighbour_that_would_not_be_aligned_begins_anew() -> None:
    plan = plan_staging(wanted_of(side_by_side(2, (5,))), SMALL)
    assert [place.offset_bytes for place in plan.places] == [0, 256]
    assert len(parts(plan)) == 2


def test_a_large_tensor_has_memory_of_its_own() -> None:
    large = row(spec("large", 0, (PAGE + 1,)))
    plan = plan_staging(wanted_of([large, row(spec("small", 4 * PAGE + 4, (4,)))]), SMALL)
    assert plan.buffers == (4 * PAGE + 4, 16)


def test_a_tensor_larger_than_a_chunk_is_read_in_several() -> None:
    plan = plan_staging(wanted_of([row(spec("large", 8, (10 * PAGE,)))]), SMALL)
    assert len(plan.chunks) > 2
    assert sum(part.n_bytes for part in parts(plan)) == 40 * PAGE


def test_a_small_gap_is_read_over_and_a_large_one_is_not() -> None:
    near = [row(spec("a", 0, (1024,))), row(spec("b", 4 * 1024 + 4000, (1024,)))]
    far = [row(spec("a", 0, (1024,))), row(spec("b", 4 * 1024 + 5000, (1024,)))]
    assert [len(chunk.reads) for chunk in plan_staging(wanted_of(near), SMALL).chunks] == [1]
    assert [len(chunk.reads) for chunk in plan_staging(wanted_of(far), SMALL).chunks] == [2]


def test_a_gap_that_is_more_than_half_of_a_read_is_not_read() -> None:
    rows = [row(spec("a", 0, (4,))), row(spec("b", 1000, (4,)))]
    assert [len(chunk.reads) for chunk in plan_staging(wanted_of(rows), SMALL).chunks] == [2]


def test_groups_come_in_their_order_and_share_no_chunk() -> None:
    rows = side_by_side(6, (8, 4))
    plan = plan_staging(wanted_of(rows, lambda name: 5 - int(name[1:])), SMALL)
    assert [chunk.group for chunk in plan.chunks] == list(range(6))
    assert [one.names for one in plan.wanted] == [(f"t{i}",) for i in reversed(range(6))]


def test_rows_of_one_region_share_a_tensor() -> None:
    tied = [row(spec("a", 0, (8,))), row(spec("b", 0, (8,)))]
    plan = plan_staging(wanted_of(tied), SMALL)
    assert [one.names for one in plan.wanted] == [("a", "b")]
    assert sum(part.n_bytes for part in parts(plan)) == 32


def test_given_memory_is_not_counted_as_needed() -> None:
    rows = [row(spec("a", 0, (8,)))._replace(device=""), row(spec("b", 32, (8,)))]
    plan = plan_staging(wanted_of(rows, is_given=lambda one: not one.device), SMALL)
    assert len(plan.given) == 1
    assert plan.n_device_bytes == 32


def test_pieces_go_straight_into_their_slices() -> None:
    pieces = tuple(Piece(spec(f"e{i}", 64 * i, (4, 4)), 16 * i, (4, 1)) for i in range(4))
    plan = plan_staging(
        wanted_of([FusedRow("e", FusedSpec("e", (4, 4, 4), pieces), F32, "cuda:0", Action.MOVE)]), SMALL
    )
    assert [(part.n_bytes, part.is_plain) for part in parts(plan)] == [(256, True)]
    assert plan.scratch_bytes == 0


def test_a_piece_that_is_no_run_passes_through_the_scratch() -> None:
    pieces = tuple(Piece(spec(f"e{i}", 64 * i, (4, 4)), 4 * i, (8, 1)) for i in range(2))
    fused = FusedRow("e", FusedSpec("e", (4, 8), pieces), F32, "cuda:0", Action.MOVE)
    plan = plan_staging(wanted_of([fused]), SMALL)
    assert [(part.shape, part.stride) for part in parts(plan)] == [((4, 4), (8, 1))] * 2
    assert plan.scratch_bytes == 64


def test_what_is_no_plain_bytes_is_not_staged() -> None:
    plain = spec("a", 0, (8,))
    assert can_be_staged(row(plain))
    assert can_be_staged(row(plain, BF16))
    assert not can_be_staged(row(plain, I64))
    assert not can_be_staged(row(plain._replace(view=StorageView(0, (2,)))))
    assert not can_be_staged(row(plain._replace(region=plain.region._replace(encoding=Encoding("none", 32, None, 4)))))


@pytest.mark.parametrize("chunk_bytes", [0, PAGE, 3 * PAGE + 1])
def test_a_chunk_that_is_not_made_of_pages_is_refused(chunk_bytes: int) -> None:
    with pytest.raises(OptionError, match="pages"):
        Limits(chunk_bytes=chunk_bytes)


def test_nothing_is_planned_for_nothing() -> None:
    plan = plan_staging([])
    assert (plan.buffers, plan.chunks, plan.n_device_bytes) == ((), (), 0)


@st.composite
def wanted_tensors(draw: st.DrawFn) -> list[Wanted]:
    """Tensors of two files, with gaps; some converted, some made of pieces that alternate, in up to three groups."""
    found: list[Wanted] = []
    ends = {"a": draw(st.integers(0, 100)), "b": 0}

    def next_spec(key: str, shape: tuple[int, ...], dtype: DType) -> TensorSpec:
        file = draw(st.sampled_from("ab"))
        offset = ends[file] + draw(st.sampled_from([0, 0, 0, 3, 900, 5000]))
        ends[file] = offset + prod(shape) * dtype.itemsize
        return spec(key, offset, shape, dtype, file)

    for number in range(draw(st.integers(1, 12))):
        dtype, group = draw(st.sampled_from([F32, BF16, I64])), draw(st.integers(0, 2))
        target = draw(st.sampled_from([dtype, F16])) if dtype is not I64 else dtype
        shape = draw(st.sampled_from([(), (0, 3), (7,), (16, 8), (33, 100), (3, 5, 700), (2, 9000)]))
        name = (f"t{number}",)
        if len(shape) < 2 or draw(st.booleans()):
            pieces = (Piece(next_spec("whole", shape, dtype), 0, contiguous_stride(shape)),)
            found.append(Wanted(name, target, shape, pieces, group))
            continue
        # Two of them, side by side along the last dimension.
        fused = (*shape[:-1], 2 * shape[-1])
        stride = contiguous_stride(fused)
        pieces = tuple(Piece(next_spec(f"half{i}", shape, dtype), i * shape[-1], stride) for i in range(2))
        found.append(Wanted(name, target, fused, pieces, group))
    return found


def places_of(part: Part) -> list[int]:
    """Where in the buffer each element of a part goes, in bytes."""
    shape = part.shape or (part.n_bytes // part.source.itemsize,)
    stride = part.stride or contiguous_stride(shape)
    found = [0]
    for size, step in zip(shape, stride, strict=True):
        found = [at + i * step for at in found for i in range(size)]
    return [part.offset_bytes + at * part.dtype.itemsize for at in found]


@given(wanted_tensors())
@settings(max_examples=30, deadline=None)
def test_every_byte_is_read_and_written_once_and_limits_are_kept(wanted: list[Wanted]) -> None:
    plan = plan_staging(wanted, SMALL)
    expected: Counter[tuple[str, int, int, int]] = Counter()
    for one, place in zip(plan.wanted, plan.places, strict=True):
        assert place.offset_bytes % 16 == 0
        assert place.offset_bytes + one.n_bytes <= plan.buffers[place.buffer]
        for piece in one.pieces:
            size, region = piece.spec.dtype.itemsize, piece.spec.region
            whole = Part(0, region.n_bytes, 0, 0, piece.spec.dtype, one.dtype, piece.spec.shape, piece.stride)
            begin = place.offset_bytes + piece.offset * one.dtype.itemsize
            for index, at in enumerate(places_of(whole) if region.n_bytes else []):
                expected[region.file, region.offset_bytes + index * size, place.buffer, begin + at] += 1
    made: Counter[tuple[str, int, int, int]] = Counter()
    for chunk in plan.chunks:
        for part in chunk.parts:
            read = next(r for r in chunk.reads if r.at_bytes <= part.at_bytes < r.at_bytes + r.n_bytes)
            assert part.at_bytes + part.n_bytes <= read.at_bytes + read.n_bytes
            first = read.offset_bytes + part.at_bytes - read.at_bytes
            for index, at in enumerate(places_of(part)):
                made[chunk.file, first + index * part.source.itemsize, part.buffer, at] += 1
    assert made == expected
    assert set(made.values()) <= {1}


@given(wanted_tensors())
@settings(max_examples=30, deadline=None)
def test_reads_fit_into_a_slot_share_no_page_and_are_mostly_used(wanted: list[Wanted]) -> None:
    plan = plan_staging(wanted, SMALL)
    assert [chunk.group for chunk in plan.chunks] == sorted(chunk.group for chunk in plan.chunks)
    for chunk in plan.chunks:
        end_page = 0
        for read in chunk.reads:
            used = sum(part.n_bytes for part in chunk.parts if 0 <= part.at_bytes - read.at_bytes < read.n_bytes)
            assert read.at_bytes % PAGE == read.offset_bytes % PAGE
            assert read.at_bytes // PAGE >= end_page
            assert read.n_bytes <= 2 * used
            end_page = -(-(read.at_bytes + read.n_bytes) // PAGE)
        assert end_page * PAGE <= SMALL.chunk_bytes
