"""Planning how rows reach a device: memory there, and chunks of the files that fill it.

Pure. Tensors that are large stand alone, each in memory of its own, so that it is freed, pickled and shared between
processes alone, as a tensor of torch's own making. Small ones are laid side by side in the order of the files: those
that are neighbours there and here, and of one type, are one copy. What is read is sorted by group, file and offset;
small gaps are read over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, product
from math import prod
from typing import NamedTuple

from fastload.dtypes import DType
from fastload.errors import OptionError
from fastload.formats.chunks import Chunk, Part, Read
from fastload.formats.runs import runs_of
from fastload.formats.specs import Region, TensorSpec, contiguous_stride
from fastload.plan.boxes import Box, narrow
from fastload.plan.fusing import Piece
from fastload.plan.rows import Action, FusedRow, PlanRow

__all__ = ["Limits", "Place", "StagingPlan", "Wanted", "can_be_staged", "plan_staging", "wanted_of"]

_PAGE = 4096
# A tensor that does not follow its neighbour begins on a multiple of this; one that does, on the smaller one.
_ALIGNMENT = 256
_LEAST_ALIGNMENT = 16
# What is smaller is not split between two chunks only to fill the first.
_LEAST_PART_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes, in bytes.

    Attributes:
        chunk_bytes: of a slot, a multiple of the page: the most that is read at once.
        gap_bytes: what may lie between two parts for both to be one read, unless half of it would be in vain.
        alone_bytes: from this size a tensor has a buffer of its own.
        buffer_bytes: most of a buffer that several tensors share.
    """

    chunk_bytes: int = 16 << 20
    gap_bytes: int = 4 << 10
    alone_bytes: int = 4 << 20
    buffer_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        if self.chunk_bytes < 2 * _PAGE or self.chunk_bytes % _PAGE:
            raise OptionError(
                "a chunk is made of pages", expected=f"a multiple of {_PAGE}, of two at least", found=self.chunk_bytes
            )


class Wanted(NamedTuple):
    """A tensor that is wanted on the device.

    Attributes:
        names: what it is for; those of one region of a file share one.
        dtype: the type it shall have.
        shape: its shape.
        pieces: what it is made of, in raw bytes; a tensor of a file is one piece, the whole.
        group: order of arrival: a lower group is there before a higher one.
        is_given: the caller has memory for it.
    """

    names: tuple[str, ...]
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    group: int = 0
    is_given: bool = False

    @property
    def n_bytes(self) -> int:
        """Its size on the device."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def source(self) -> DType:
        """The type of its pieces."""
        return self.pieces[0].spec.dtype

    @property
    def region(self) -> Region:
        """Where it begins in the files."""
        first = self.pieces[0].spec.region
        return first if len(self.pieces) == 1 else min(piece.spec.region for piece in self.pieces)


class Place(NamedTuple):
    """Where a tensor is: the number of a buffer, and the bytes before it there."""

    buffer: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class StagingPlan:
    """What is done for one device.

    Attributes:
        wanted: the tensors, in the order of group, file and offset.
        places: where each of them will be.
        buffers: bytes of each buffer.
        chunks: what is read and copied, in order.
    """

    wanted: tuple[Wanted, ...]
    places: tuple[Place, ...]
    buffers: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def scratch_bytes(self) -> int:
        """Device memory that conversions pass through: the largest part that is not copied as it is."""
        return max((part.n_bytes for chunk in self.chunks for part in chunk.parts if not part.is_plain), default=0)

    @property
    def given(self) -> frozenset[int]:
        """Numbers of the buffers that the caller has."""
        return frozenset(
            place.buffer for wanted, place in zip(self.wanted, self.places, strict=True) if wanted.is_given
        )

    @property
    def n_device_bytes(self) -> int:
        """Device memory that is to be allocated."""
        given = self.given
        return self.scratch_bytes + sum(n_bytes for number, n_bytes in enumerate(self.buffers) if number not in given)


class _Copy(NamedTuple):
    """Bytes of a file and their place in a buffer; the fields are those of Part."""

    group: int
    file: str
    offset_bytes: int
    n_bytes: int
    buffer: int
    to_bytes: int
    source: DType
    dtype: DType
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()

    def with_bytes(self, n_bytes: int) -> _Copy:
        """As many bytes from where it begins; tuples are added, as `_replace` takes four times as long."""
        return self if n_bytes == self.n_bytes else _Copy._make((*self[:3], n_bytes, *self[4:]))

    def part(self, begin_bytes: int, n_bytes: int) -> _Copy:
        """Some of the bytes of a copy that is no box."""
        return self._replace(
            offset_bytes=self.offset_bytes + begin_bytes,
            n_bytes=n_bytes,
            to_bytes=self.to_bytes + begin_bytes // self.source.itemsize * self.dtype.itemsize,
        )


def can_be_staged(row: PlanRow | FusedRow) -> bool:
    """Whether a row is raw bytes of files that become a tensor by copies and a conversion of floating point types."""
    specs = [piece.spec for piece in row.spec.pieces] if isinstance(row, FusedRow) else [row.spec]
    if any(spec.region.encoding is not None for spec in specs):
        return False
    is_part = isinstance(row, FusedRow) or row.action is Action.SLICE
    if any(_raw(spec).view is not None and not (is_part and _has_long_rows(spec)) for spec in specs):
        return False
    return all(spec.dtype is row.dtype or (spec.dtype.castable and row.dtype.castable) for spec in specs)


def _raw(spec: TensorSpec) -> TensorSpec:
    """A view of a larger storage as a tensor of its own bytes, where these follow each other. Others as they are."""
    if spec.view is None or spec.region.encoding is not None:
        return spec
    expected = contiguous_stride(spec.shape)
    if any(size > 1 and one != other for size, one, other in zip(spec.shape, spec.view.stride, expected, strict=True)):
        return spec
    offset_bytes = spec.region.offset_bytes + spec.view.offset * spec.dtype.itemsize
    return spec._replace(region=Region(spec.region.file, offset_bytes, spec.n_bytes), view=None)


def wanted_of(
    rows: Iterable[PlanRow | FusedRow],
    group_of: Callable[[str], int] = lambda fqn: 0,
    is_given: Callable[[PlanRow | FusedRow], bool] = lambda row: False,
) -> list[Wanted]:
    """The tensors that rows ask for. Rows of one region and type share one, as they do in the file.

    Args:
        rows: rows that `can_be_staged`.
        group_of: name -> group of its arrival.
        is_given: whether a row fills memory that is there.
    """
    found: dict[tuple[object, ...], Wanted] = {}
    for row in rows:
        group, given = group_of(row.fqn), is_given(row)
        at: tuple[object, ...] = (row.fqn,)
        if isinstance(row, FusedRow):
            pieces = row.spec.pieces
            if any(piece.spec.view is not None for piece in pieces):
                pieces = tuple(part for one in pieces for part in _rows_of(one._replace(spec=_raw(one.spec))))
        else:
            spec = _raw(row.spec)
            pieces = tuple(_rows_of(Piece(spec, 0, contiguous_stride(spec.shape))))
            if not given and spec.region.n_bytes and spec.view is None:
                at = (spec.region, spec.dtype, row.dtype, spec.shape)
        known = found.get(at)
        if known is None:
            found[at] = Wanted((row.fqn,), row.dtype, row.spec.shape, pieces, group, given)
        else:
            found[at] = known._replace(names=(*known.names, row.fqn), group=min(known.group, group))
    return list(found.values())


def _has_long_rows(spec: TensorSpec) -> bool:
    """Whether the rows of a tensor are long enough in its file for each to be a copy of its own."""
    runs = runs_of(spec, gap_bytes=0)
    return runs.n_bytes >= _LEAST_PART_BYTES and runs.stride == contiguous_stride(spec.shape)


def _rows_of(piece: Piece) -> Iterator[Piece]:
    """A piece as pieces that are runs of the file: itself, or rows that lie apart there."""
    spec, offset, stride = piece
    if spec.view is None:
        yield piece
        return
    nothing = (0,) * len(spec.shape)
    # So many dimensions are gone through, one index after the other, that what is left of the others is a run.
    n_outer = next(n for n in range(len(nothing)) if _row(spec, nothing, n).view is None)
    for index in product(*map(range, spec.shape[:n_outer])):
        row = _row(spec, (*index, *nothing[n_outer:]), n_outer)
        at = offset + sum(number * step for number, step in zip(index, stride, strict=False))
        # What a dimension of size 1 would step over is of no account.
        steps = zip(row.shape, stride, contiguous_stride(row.shape), strict=True)
        yield Piece(row, at, tuple(plain if size == 1 else step for size, step, plain in steps))


def _row(spec: TensorSpec, offset: tuple[int, ...], n_outer: int) -> TensorSpec:
    return narrow(spec, Box(offset, (*(1,) * n_outer, *spec.shape[n_outer:])))


def plan_staging(wanted: Iterable[Wanted], limits: Limits | None = None) -> StagingPlan:
    """Lay tensors out on a device, and cut what they are made of into chunks."""
    limits = limits or Limits()
    ordered = sorted(wanted, key=lambda one: (one.group, one.region[:2]))
    places, buffers = _lay_out(ordered, limits)
    copies = [copy for one, place in zip(ordered, places, strict=True) for copy in _copies(one, place, limits)]
    copies.sort(key=lambda copy: copy[:3])
    chunks = _chunks(_joined(copies), limits)
    return StagingPlan(tuple(ordered), tuple(places), tuple(buffers), tuple(chunks))


def _lay_out(ordered: Sequence[Wanted], limits: Limits) -> tuple[list[Place], list[int]]:
    """Give every tensor its place. One that follows its neighbour in the file follows it here too, if it may."""
    places: list[Place] = []
    buffers: list[int] = []
    # (group, type) -> the buffer that is being filled, and where in the file the last tensor in it ends
    filling: dict[tuple[int, DType], tuple[int, tuple[str, int]]] = {}
    for one in ordered:
        n_bytes = one.n_bytes
        if one.is_given or n_bytes >= limits.alone_bytes:
            places.append(Place(len(buffers), 0))
            buffers.append(n_bytes)
            continue
        region = one.region
        number, end_in_file = filling.get((one.group, one.dtype), (-1, ("", 0)))
        offset = 0
        if number >= 0:
            offset = buffers[number]
            if end_in_file != (region.file, region.offset_bytes) or offset % _LEAST_ALIGNMENT:
                offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        if number < 0 or offset + n_bytes > limits.buffer_bytes:
            number, offset = len(buffers), 0
            buffers.append(0)
        places.append(Place(number, offset))
        buffers[number] = offset + n_bytes
        end = region.offset_bytes + region.n_bytes if len(one.pieces) == 1 else -1
        filling[one.group, one.dtype] = number, (region.file, end)
    return places, buffers


def _copies(one: Wanted, place: Place, limits: Limits) -> Iterator[_Copy]:
    for piece in one.pieces:
        region = piece.spec.region
        if not region.n_bytes:
            continue
        to_bytes = place.offset_bytes + piece.offset * one.dtype.itemsize
        whole = _Copy(
            one.group, region.file, region.offset_bytes, region.n_bytes, place.buffer, to_bytes, one.source, one.dtype
        )
        if piece.is_contiguous:
            yield whole
        else:
            yield from _boxes(whole._replace(shape=piece.spec.shape, stride=piece.stride), limits.chunk_bytes - _PAGE)


def _boxes(copy: _Copy, most_bytes: int) -> Iterator[_Copy]:
    """A box in boxes of no more than most_bytes, along its first dimensions."""
    if copy.stride == contiguous_stride(copy.shape):
        copy = copy._replace(shape=(), stride=())
    if copy.n_bytes <= most_bytes or not copy.shape:
        yield copy
        return
    row_bytes = copy.n_bytes // copy.shape[0]
    n_rows = max(1, most_bytes // row_bytes)
    for begin in range(0, copy.shape[0], n_rows):
        n = min(n_rows, copy.shape[0] - begin)
        box = copy._replace(
            offset_bytes=copy.offset_bytes + begin * row_bytes,
            n_bytes=n * row_bytes,
            to_bytes=copy.to_bytes + begin * copy.stride[0] * copy.dtype.itemsize,
            shape=(n, *copy.shape[1:]),
        )
        # A single row may be too large still: then its own first dimension is the one to go along.
        yield from _boxes(box if n > 1 else box._replace(shape=box.shape[1:], stride=box.stride[1:]), most_bytes)


def _joined(copies: Iterable[_Copy]) -> Iterator[_Copy]:
    """Copies that go on in both file and buffer, as one."""
    last: _Copy | None = None
    n_bytes = 0  # of the last, with what was joined to it
    for copy in copies:
        if (
            last is not None
            and copy.offset_bytes == last.offset_bytes + n_bytes
            and copy.buffer == last.buffer
            and copy.to_bytes == last.to_bytes + n_bytes // last.source.itemsize * last.dtype.itemsize
            and copy.source is last.source
            and copy.dtype is last.dtype
            and copy.file == last.file
            and copy.group == last.group
            and not copy.stride
            and not last.stride
        ):
            n_bytes += copy.n_bytes
            continue
        if last is not None:
            yield last.with_bytes(n_bytes)
        last, n_bytes = copy, copy.n_bytes
    if last is not None:
        yield last.with_bytes(n_bytes)


@dataclass(slots=True)
class _OpenChunk:
    """A chunk that is being filled."""

    reads: list[Read] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    n_covered_bytes: int = 0  # of the last read, without gaps

    def put(self, copy: _Copy, limits: Limits) -> int:
        """Take as many bytes of a copy as fit, and say how many."""
        joined = self._join(copy, limits)
        if joined is not None:
            read, n_bytes, n_covered = joined
            self.reads[-1] = read
            self.n_covered_bytes = n_covered
        else:
            last = self.reads[-1] if self.reads else Read(0, 0, 0)
            begin = -(-(last.at_bytes + last.n_bytes) // _PAGE) * _PAGE + copy.offset_bytes % _PAGE
            n_bytes = _fitting(copy, limits.chunk_bytes - begin, limits)
            if not n_bytes:
                return 0
            read = Read(copy.offset_bytes, n_bytes, begin)
            self.reads.append(read)
            self.n_covered_bytes = n_bytes
        at = read.at_bytes + copy.offset_bytes - read.offset_bytes
        self.parts.append(
            Part(at, n_bytes, copy.buffer, copy.to_bytes, copy.source, copy.dtype, copy.shape, copy.stride)
        )
        return n_bytes

    def _join(self, copy: _Copy, limits: Limits) -> tuple[Read, int, int] | None:
        """The last read with a copy in it, the bytes of the copy that fit, and the bytes that are not gaps; or None."""
        if not self.reads:
            return None
        read = self.reads[-1]
        end = read.offset_bytes + read.n_bytes
        # Views of one storage may overlap: then one begins before the place where the chunk before was full.
        if not read.offset_bytes <= copy.offset_bytes <= end + limits.gap_bytes:
            return None
        at = read.at_bytes + copy.offset_bytes - read.offset_bytes
        n_bytes = _fitting(copy, limits.chunk_bytes - at, limits)
        new_end = max(end, copy.offset_bytes + n_bytes)
        n_covered = self.n_covered_bytes + max(0, new_end - max(end, copy.offset_bytes))
        n_read_bytes = new_end - read.offset_bytes
        if not n_bytes or n_read_bytes > 2 * n_covered:
            return None
        return Read(read.offset_bytes, n_read_bytes, read.at_bytes), n_bytes, n_covered


def _fitting(copy: _Copy, room_bytes: int, limits: Limits) -> int:
    """The bytes of a copy to be put where there is room; whole elements, and no scraps. 0 for none."""
    if copy.n_bytes <= room_bytes:
        return copy.n_bytes
    if copy.stride or room_bytes < min(_LEAST_PART_BYTES, limits.chunk_bytes // 2):
        return 0
    return room_bytes // _ALIGNMENT * _ALIGNMENT


def _chunks(copies: Iterable[_Copy], limits: Limits) -> Iterator[Chunk]:
    for (group, file), run in groupby(copies, key=lambda copy: copy[:2]):
        open_chunk = _OpenChunk()
        for copy in run:
            left = copy
            while (n_bytes := open_chunk.put(left, limits)) < left.n_bytes:
                left = left.part(n_bytes, left.n_bytes - n_bytes) if n_bytes else left
                yield Chunk(file, group, tuple(open_chunk.reads), tuple(open_chunk.parts))
                open_chunk = _OpenChunk()
        yield Chunk(file, group, tuple(open_chunk.reads), tuple(open_chunk.parts))
