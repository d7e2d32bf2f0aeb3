"""What one rank has of a state dict: its part of every tensor, and of the views that files have in their place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from fastload.distributed.layouts import local, part_of
from fastload.errors import OptionError
from fastload.formats.specs import StorageView
from fastload.plan.boxes import Box, Joined, box_of_view, inside
from fastload.plan.shares import Held
from fastload.storage.sharing import identity

__all__ = ["Part", "held_of", "narrowed", "parts_of"]


class Piece(NamedTuple):
    """Values, and the box of the whole tensor that they are."""

    box: Box
    tensor: torch.Tensor


class Part(NamedTuple):
    """What this rank has of a tensor.

    Attributes:
        shape: of the whole tensor.
        pieces: one; several of a parameter that is split by groups.
        is_laid_out: other ranks have other parts of it.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_laid_out: bool

    @property
    def dtype(self) -> torch.dtype:
        """The type of its values."""
        return self.pieces[0].tensor.dtype


def parts_of(
    tensors: Mapping[str, torch.Tensor],
    check: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    in_files: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None,
) -> dict[str, Part]:
    """What this rank has of a state dict.

    Args:
        tensors: DTensors and others, by key.
        check: for this rank's parts, by key; raises for what no checkpoint can hold, and returns what is stored.
        in_files: makes of a state dict that of the files: other names, and views in the place of tensors. Of DTensors
            it sees likenesses on the meta device.

    Raises:
        OptionError: a placement is not one that weights can have; ``in_files`` makes more of a DTensor than views.
    """
    here = check({key: local(tensor) for key, tensor in tensors.items()})
    parts = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            parts[key] = Part(tuple(tensor.shape), _pieces(here[key], part_of(key, tensor)), is_laid_out=True)
        else:
            parts[key] = _plain(here[key])
    return parts if in_files is None else _views(parts, in_files)


def _plain(tensor: torch.Tensor) -> Part:
    shape = tuple(tensor.shape)
    return Part(shape, (Piece(Box((0,) * len(shape), shape), tensor),), is_laid_out=False)


def _pieces(tensor: torch.Tensor, part: Box | Joined) -> tuple[Piece, ...]:
    if isinstance(part, Box):
        return (Piece(part, tensor),)
    sizes = [box.shape[part.dim] for box in part.boxes]
    return tuple(map(Piece, part.boxes, torch.split(tensor, sizes, part.dim)))


def _views(
    parts: Mapping[str, Part], in_files: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
) -> dict[str, Part]:
    """Views of parts, as they are made of likenesses of the whole tensors."""
    likenesses = {
        key: torch.empty(part.shape, dtype=part.dtype, device="meta") if part.is_laid_out else part.pieces[0].tensor
        for key, part in parts.items()
    }
    seen_as = {
        tensor.untyped_storage()._cdata: parts[key] for key, tensor in likenesses.items() if parts[key].is_laid_out
    }
    views = {}
    for key, tensor in in_files(likenesses).items():
        if not tensor.is_meta:
            views[key] = _plain(tensor)
            continue
        part = seen_as.get(tensor.untyped_storage()._cdata)
        view = None if part is None or tensor.dtype != part.dtype else _view(part, tensor)
        if view is None:
            raise OptionError("a tensor that is laid out over ranks is stored as something else than a view", key=key)
        views[key] = view
    return views


def _view(part: Part, likeness: torch.Tensor) -> Part | None:
    """A view of a part; None if it is none of a box."""
    shape = tuple(likeness.shape)
    place = StorageView(int(likeness.storage_offset()), likeness.stride())
    pieces = []
    for piece in part.pieces:
        found = box_of_view(part.shape, piece.box, shape, place)
        if found is None:
            return None
        box, inner, dims = found
        if prod(inner.shape):
            tensor = _narrowed(piece, inner)
            stride = [1 if dim is None else tensor.stride(dim) for dim in dims]
            pieces.append(Piece(box, tensor.as_strided(box.shape, stride, tensor.storage_offset())))
        else:
            pieces.append(Piece(box, piece.tensor.new_empty(box.shape)))
    return Part(shape, tuple(pieces), is_laid_out=True)


def held_of(parts: Mapping[str, Part]) -> dict[str, Held]:
    """What a rank tells of its parts."""
    numbers: dict[Hashable, int] = {}
    held = {}
    for key, part in parts.items():
        memory = tuple((box, identity(tensor)) for box, tensor in part.pieces if prod(box.shape))
        number = numbers.setdefault((part.shape, memory), len(numbers)) if memory else None
        boxes = tuple(piece.box for piece in part.pieces)
        dtype, itemsize = str(part.dtype).removeprefix("torch."), part.dtype.itemsize
        held[key] = Held(dtype, itemsize, part.shape, boxes, part.is_laid_out, number)
    return held


def narrowed(part: Part, box: Box) -> torch.Tensor:
    """The values of a box, all of which one piece of the part has."""
    return _narrowed(next(piece for piece in part.pieces if inside(box, piece.box)), box)


def _narrowed(piece: Piece, box: Box) -> torch.Tensor:
    tensor = piece.tensor
    for dim, (begin, at, size) in enumerate(zip(box.offset, piece.box.offset, box.shape, strict=True)):
        tensor = tensor.narrow(dim, begin - at, size)
    return tensor
