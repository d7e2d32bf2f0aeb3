"""Which rank writes what of a checkpoint that many ranks hold together.

Pure. Every byte is written by one rank: a box that one rank has, by that rank; a box that several have, by whichever of
them has the least to write, in slabs if it is large. A box becomes runs of bytes that follow each other in the file.
Blocks that get their checksum are shared out in the same way, each to one of the ranks that write into it, which finds
it in its own page cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from fastload.errors import OptionError
from fastload.formats.specs import contiguous_stride
from fastload.plan.boxes import Box

__all__ = ["Block", "Held", "Share", "Whole", "assemble", "runs", "share_blocks", "share_out"]

# A box that several ranks have is divided among them in pieces of about this.
_SLAB_BYTES = 16 << 20


class Held(NamedTuple):
    """What one rank has of a tensor.

    Attributes:
        dtype: name of its type.
        itemsize: bytes of an element.
        shape: of all of it.
        boxes: what is here; several of a part that is split by groups.
        is_part: it is laid out over ranks. Otherwise it is a tensor of this rank, and other ranks may have others.
        memory: equal for tensors of this rank that are the same memory; None for one that has none.
    """

    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    is_part: bool
    memory: int | None


class Whole(NamedTuple):
    """A tensor that ranks have together.

    Attributes:
        dtype: name of its type.
        itemsize: bytes of an element.
        shape: of all of it.
        ranks_of: box -> the ranks that have it. The boxes are disjoint, and all of the tensor.
        memory: equal for tensors that are the same memory on every rank; None for one that has none.
    """

    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    ranks_of: dict[Box, list[int]]
    memory: Hashable


class Share(NamedTuple):
    """A box of a tensor, for a rank to write."""

    key: str
    box: Box


class Block(NamedTuple):
    """Bytes of a tensor that have a checksum of their own: where they begin in the tensor, and how many they are."""

    key: str
    begin: int
    n_bytes: int


def assemble(held: Sequence[Mapping[str, Held]]) -> dict[str, Whole]:
    """The tensors that ranks have together, in the order of the first rank, then of the next ones.

    Of a tensor that is not laid out, the first rank's is the one.

    Args:
        held: what each rank has, by key.

    Raises:
        OptionError: ranks do not agree on a tensor, or their boxes are not the whole of it.
    """
    holders: dict[str, list[int]] = {}
    for rank, tensors in enumerate(held):
        for key in tensors:
            holders.setdefault(key, []).append(rank)
    return {key: _assemble(key, {rank: held[rank][key] for rank in ranks}) for key, ranks in holders.items()}


def _assemble(key: str, held: Mapping[int, Held]) -> Whole:
    first_rank, first = next(iter(held.items()))
    for rank, other in held.items():
        if (other.dtype, other.shape, other.is_part) != (first.dtype, first.shape, first.is_part):
            raise OptionError(
                "the ranks have different tensors under one name",
                key=key,
                expected=f"{_described(first)}, as on rank {first_rank}",
                found=f"{_described(other)} on rank {rank}",
                fix="build and lay out the same model on all ranks",
            )
    if not first.is_part:
        held = {first_rank: first}
    ranks_of: dict[Box, list[int]] = {}
    for rank, part in held.items():
        for box in part.boxes:
            if prod(box.shape):
                ranks_of.setdefault(box, []).append(rank)
    n_found = sum(prod(box.shape) for box in ranks_of)
    if n_found != prod(first.shape):
        raise OptionError(
            "the ranks do not have all of a tensor between them",
            key=key,
            expected=f"parts of {prod(first.shape):,} elements together",
            found=f"parts of {n_found:,}",
            fix="save from all ranks that have a part, in one process group",
        )
    memory = tuple((rank, held[rank].memory) for ranks in ranks_of.values() for rank in ranks)
    has_memory = bool(memory) and all(number is not None for _, number in memory)
    return Whole(first.dtype, first.itemsize, first.shape, ranks_of, memory if has_memory else None)


def _described(held: Held) -> str:
    return f"{held.dtype} {list(held.shape)}, {'laid out over ranks' if held.is_part else 'a plain tensor'}"


def share_out(wholes: Mapping[str, Whole], n_ranks: int) -> list[list[Share]]:
    """What each rank writes: all bytes once, those that several ranks have spread evenly."""
    shares: list[list[Share]] = [[] for _ in range(n_ranks)]
    loads = [0] * n_ranks
    shared: list[tuple[int, Share, list[int]]] = []
    for key, whole in wholes.items():
        for box, ranks in whole.ranks_of.items():
            if len(ranks) == 1:
                shares[ranks[0]].append(Share(key, box))
                loads[ranks[0]] += _n_bytes(box, whole)
            else:
                shared += [(_n_bytes(slab, whole), Share(key, slab), ranks) for slab in _slabs(box, whole)]
    # The largest first, so that what is left over evens out.
    for n_bytes, share, ranks in sorted(shared, key=lambda one: -one[0]):
        rank = min(ranks, key=loads.__getitem__)
        shares[rank].append(share)
        loads[rank] += n_bytes
    return shares


def _n_bytes(box: Box, whole: Whole) -> int:
    return prod(box.shape) * whole.itemsize


def _slabs(box: Box, whole: Whole) -> Iterator[Box]:
    """A box in pieces along its first dimension that has more than one element."""
    n_pieces = -(-_n_bytes(box, whole) // _SLAB_BYTES)
    dim = next((dim for dim, size in enumerate(box.shape) if size > 1), 0)
    size = box.shape[dim] if box.shape else 1
    if n_pieces < 2:
        yield box
        return
    step = -(-size // n_pieces)
    for begin in range(0, size, step):
        offset, shape = list(box.offset), list(box.shape)
        offset[dim] += begin
        shape[dim] = min(step, size - begin)
        yield Box(tuple(offset), tuple(shape))


def runs(shape: tuple[int, ...], box: Box, itemsize: int) -> Iterator[tuple[int, int]]:
    """The bytes of a box in the order of its elements, as (offset within the tensor, number) of those that follow
    each other there."""
    if not prod(box.shape):
        return
    inner = len(shape)
    while inner and box.shape[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)  # the first dimension of a run may be a part
    stride = contiguous_stride(shape)
    first = sum(begin * step for begin, step in zip(box.offset, stride, strict=True)) * itemsize
    n_bytes = prod(box.shape[inner:]) * itemsize
    steps = [range(0, size * step * itemsize, step * itemsize) for size, step in zip(box.shape, stride, strict=True)]
    for offsets in product(*steps[:inner]):
        yield first + sum(offsets), n_bytes


def share_blocks(
    blocks: Sequence[Block], wholes: Mapping[str, Whole], shares: Sequence[Sequence[Share]], block_bytes: int
) -> list[list[int]]:
    """Which blocks each rank reads for their checksums: each block by one of the ranks that write into it.

    Args:
        blocks: of all tensors, each tensor's beginning at multiples of ``block_bytes``.
        wholes: the tensors.
        shares: what each rank writes.
        block_bytes: the size of a block.

    Returns:
        Numbers of blocks for each rank, ascending.
    """
    writers: dict[tuple[str, int], list[int]] = defaultdict(list)
    for rank, own in enumerate(shares):
        found = {(key, number) for key, box in own for number in _blocks_of(box, wholes[key], block_bytes)}
        for place in found:
            writers[place].append(rank)
    numbers: list[list[int]] = [[] for _ in shares]
    loads = [0] * len(shares)
    for number, block in enumerate(blocks):
        rank = min(writers[block.key, block.begin // block_bytes], key=loads.__getitem__)
        numbers[rank].append(number)
        loads[rank] += block.n_bytes
    return numbers


def _blocks_of(box: Box, whole: Whole, block_bytes: int) -> range:
    """Numbers of the blocks from a box's first byte to its last."""
    stride = contiguous_stride(whole.shape)
    first = sum(begin * step for begin, step in zip(box.offset, stride, strict=True))
    last = first + sum((size - 1) * step for size, step in zip(box.shape, stride, strict=True))
    return range(first * whole.itemsize // block_bytes, ((last + 1) * whole.itemsize - 1) // block_bytes + 1)
