"""The part of a tensor that one rank owns, and where it lies in the files.

Pure. A layout over ranks is a sequence of splits: along a dimension, into parts as `torch.chunk` makes them (all of one
size, rounded up, but for the last ones, which may be smaller or empty). What is left is a box of the tensor. Rows of
the plan are made for that box as they are for a whole tensor: where its bytes follow each other in the file, it is a
tensor of the file in its own right, to be mapped, converted or staged as any other; where they do not, it is a strided
view.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from fastload.formats.specs import StorageView, TensorSpec, contiguous_stride
from fastload.plan.fusing import FusedSpec, Piece

__all__ = [
    "Box",
    "Joined",
    "Split",
    "box_in",
    "box_of",
    "box_of_view",
    "inside",
    "joined_of",
    "narrow",
    "narrow_fused",
    "narrow_joined",
    "overlap",
]


class Split(NamedTuple):
    """One cut of a tensor.

    Attributes:
        dim: the dimension that is cut.
        n_parts: into how many parts.
        part: number of the part that is kept.
    """

    dim: int
    n_parts: int
    part: int


class Box(NamedTuple):
    """A part of a tensor, in elements: where it begins along each dimension, and its size there."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Joined(NamedTuple):
    """Boxes of a tensor that one rank has side by side: of several tensors that are one parameter, a part of each.

    Attributes:
        dim: the dimension along which they lie one after the other.
        boxes: where they are in the whole tensor.
    """

    dim: int
    boxes: tuple[Box, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """What they are together."""
        first = list(self.boxes[0].shape)
        first[self.dim] = sum(box.shape[self.dim] for box in self.boxes)
        return tuple(first)


def box_of(shape: tuple[int, ...], splits: Iterable[Split]) -> Box:
    """What splits leave of a tensor, each a cut of what those before it left."""
    offset, sizes = [0] * len(shape), list(shape)
    for dim, n_parts, part in splits:
        most = -(-sizes[dim] // n_parts)
        begin = min(most * part, sizes[dim])
        offset[dim] += begin
        sizes[dim] = min(most, sizes[dim] - begin)
    return Box(tuple(offset), tuple(sizes))


def overlap(a: Box, b: Box) -> Box:
    """What two boxes of one tensor have in common; a box without elements if that is nothing."""
    begins = tuple(map(max, a.offset, b.offset))
    ends = (min(x + n, y + m) for x, n, y, m in zip(*a, *b, strict=True))
    return Box(begins, tuple(max(0, end - begin) for begin, end in zip(begins, ends, strict=True)))


def inside(part: Box, box: Box) -> bool:
    """Whether a box lies in another one."""
    return overlap(part, box) == part


def box_in(whole: TensorSpec, part: TensorSpec) -> Box:
    """The box of a contiguous tensor of the files that `narrow` made a part of."""
    if not prod(part.shape):
        return Box((0,) * len(part.shape), part.shape)
    left = (part.region.offset_bytes - whole.region.offset_bytes) // whole.dtype.itemsize
    offset = []
    for step in contiguous_stride(whole.shape):
        offset.append(left // step)
        left %= step
    return Box(tuple(offset), part.shape)


def box_of_view(
    shape: tuple[int, ...], box: Box, view_shape: tuple[int, ...], view: StorageView
) -> tuple[Box, Box, tuple[int | None, ...]] | None:
    """What a view of a tensor has of a box of that tensor.

    Args:
        shape: of the tensor, which is contiguous.
        box: the part of it.
        view_shape: of the view.
        view: where in the tensor's elements it begins, and its strides.

    Returns:
        The box of the view; the same elements as a box of the tensor; and for each dimension of the view the one of the
        tensor that it runs along, None where it has one element. None for a view that is no box of the tensor.
    """
    if shape and not view_shape:
        return None  # a single element, of which a rank may have none: no box says that
    steps = contiguous_stride(shape)
    dim_of = {step: dim for dim, (step, size) in enumerate(zip(steps, shape, strict=True)) if size > 1}
    dims = [dim_of.get(step) if size > 1 else None for size, step in zip(view_shape, view.stride, strict=True)]
    along = [dim for dim in dims if dim is not None]
    if len(along) != len({*along}) or len(along) != sum(size > 1 for size in view_shape):
        return None
    begins = [view.offset // step % max(size, 1) for step, size in zip(steps, shape, strict=True)]
    sizes = {dim: size for dim, size in zip(dims, view_shape, strict=True) if dim is not None}
    firsts, n_found = [], []
    for dim, (begin, first, n) in enumerate(zip(begins, box.offset, box.shape, strict=True)):
        end = begin + sizes.get(dim, 1)
        if end > shape[dim]:
            return None
        firsts.append(max(begin, first))
        n_found.append(max(0, min(end, first + n) - firsts[-1]))
    if not all(n_found):
        n_found = [0] * len(shape)
    offset = tuple(0 if dim is None else firsts[dim] - begins[dim] for dim in dims)
    size = tuple(int(all(n_found)) if dim is None else n_found[dim] for dim in dims)
    return Box(offset, size), Box(tuple(firsts), tuple(n_found)), tuple(dims)


def narrow(spec: TensorSpec, box: Box) -> TensorSpec:
    """A box of a tensor of the files, as a tensor of the files.

    The same spec if the box is all of it. Otherwise its region is what lies between the first and the last of the
    box's bytes, and its view None if there is nothing else between them.
    """
    if box.shape == spec.shape:
        return spec
    region, itemsize = spec.region, spec.dtype.itemsize
    first, stride = spec.view or StorageView(0, contiguous_stride(spec.shape))
    first += sum(begin * step for begin, step in zip(box.offset, stride, strict=True))
    if region.encoding is not None:
        # Only the whole can be decoded.
        return spec._replace(shape=box.shape, view=StorageView(first if prod(box.shape) else 0, stride))
    if not prod(box.shape):
        return spec._replace(shape=box.shape, region=region._replace(n_bytes=0), view=None)
    n_elements = 1 + sum((size - 1) * step for size, step in zip(box.shape, stride, strict=True))
    region = region._replace(offset_bytes=region.offset_bytes + first * itemsize, n_bytes=n_elements * itemsize)
    view = None if _is_contiguous(box.shape, stride) else StorageView(0, stride)
    return spec._replace(shape=box.shape, region=region, view=view)


def narrow_fused(spec: FusedSpec, box: Box) -> FusedSpec:
    """A box of a fused tensor: those boxes of its pieces that lie in it."""
    if box.shape == spec.shape:
        return spec
    stride = contiguous_stride(box.shape)
    pieces = [part for piece in spec.pieces if (part := _part_of(piece, spec.shape, box, stride)) is not None]
    if not pieces:
        first = spec.pieces[0].spec
        nothing = narrow(first, Box((0,) * len(first.shape), (0,) * len(first.shape)))
        pieces = [Piece(nothing, 0, contiguous_stride(nothing.shape))]
    return FusedSpec(spec.key, box.shape, tuple(pieces))


def joined_of(shape: tuple[int, ...], split: Split, n_groups: int, others: Iterable[Split] = ()) -> Joined:
    """What a split leaves of each of so many groups, in which the tensor lies one after the other.

    Args:
        shape: of the whole tensor.
        split: how each group is cut; the groups are along its dimension.
        n_groups: how many groups there are.
        others: cuts of other dimensions.
    """
    around = box_of(shape, others)
    boxes = []
    for number in range(n_groups):
        group = box_of(around.shape, [Split(split.dim, n_groups, number)])
        part = box_of(group.shape, [split])
        offset = tuple(map(sum, zip(around.offset, group.offset, part.offset, strict=True)))
        boxes.append(Box(offset, part.shape))
    return Joined(split.dim, tuple(boxes))


def narrow_joined(spec: TensorSpec | FusedSpec, part: Joined) -> FusedSpec:
    """Boxes side by side, of a tensor of the files or of a fused one, as a fused tensor."""
    if isinstance(spec, TensorSpec):
        spec = FusedSpec(spec.key, spec.shape, (Piece(spec, 0, contiguous_stride(spec.shape)),))
    stride = contiguous_stride(part.shape)
    pieces: list[Piece] = []
    begin = 0
    for box in part.boxes:
        found = (_part_of(piece, spec.shape, box, stride) for piece in spec.pieces)
        pieces += (piece._replace(offset=begin + piece.offset) for piece in found if piece is not None)
        begin += box.shape[part.dim] * stride[part.dim]
    return FusedSpec(spec.key, part.shape, tuple(pieces)) if pieces else narrow_fused(spec, part.boxes[0])


def _part_of(piece: Piece, shape: tuple[int, ...], box: Box, stride: tuple[int, ...]) -> Piece | None:
    """What a box has of a piece of a fused tensor of a shape; None for nothing. The stride is the box's own."""
    steps = contiguous_stride(shape)
    stacked = _stacked_dim(piece, shape, steps)
    sizes = list(piece.spec.shape)
    if stacked is not None:
        sizes.insert(stacked, 1)
    at = [piece.offset // step % size for step, size in zip(steps, shape, strict=True)]
    begins = [max(begin, first) for begin, first in zip(at, box.offset, strict=True)]
    ends = [
        min(begin + size, first + n) for begin, size, first, n in zip(at, sizes, box.offset, box.shape, strict=True)
    ]
    if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
        return None
    dims = [dim for dim in range(len(shape)) if dim != stacked]
    inner = Box(tuple(begins[dim] - at[dim] for dim in dims), tuple(ends[dim] - begins[dim] for dim in dims))
    offset = sum((begin - first) * step for begin, first, step in zip(begins, box.offset, stride, strict=True))
    return Piece(narrow(piece.spec, inner), offset, tuple(stride[dim] for dim in dims))


def _stacked_dim(piece: Piece, shape: tuple[int, ...], steps: tuple[int, ...]) -> int | None:
    """The dimension of the fused tensor that a piece does not have; None if it has all.

    Where a dimension of size 1 leaves several answers, they mean the same elements.
    """
    if len(piece.spec.shape) == len(shape):
        return None
    return next(
        dim
        for dim in range(len(shape))
        if steps[:dim] + steps[dim + 1 :] == piece.stride
        and all(n <= size for n, size in zip(piece.spec.shape, shape[:dim] + shape[dim + 1 :], strict=True))
    )


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements follow each other in the order of a contiguous tensor; dimensions of size 1 have no say."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
