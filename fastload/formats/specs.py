"""What a reader of any format says about a file: tensors described, not made.

These are named tuples rather than dataclasses: a checkpoint can hold 100,000 tensors, and a named tuple is made
in a fraction of the time of a frozen dataclass.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import NamedTuple

from fastload.dtypes import DType

__all__ = [
    "Encoding",
    "FileContents",
    "FusedSpec",
    "Piece",
    "Region",
    "StorageView",
    "TensorSpec",
    "contiguous_stride",
]


class Encoding(NamedTuple):
    """How the bytes of a region are kept in the file when they cannot be used as they lie there.

    Attributes:
        compression: ``"none"`` or ``"deflate"`` (a raw deflate stream, as in a zip entry).
        n_bytes: length of the encoded bytes in the file.
        crc32: checksum of the decoded bytes, as the zip directory gives it; None where there is none.
        swap_bytes: width in bytes of the units to be byte-swapped (big-endian data); 1 for none.
    """

    compression: str
    n_bytes: int
    crc32: int | None
    swap_bytes: int


class Region(NamedTuple):
    """A run of bytes in a file that is one tensor's storage.

    Attributes:
        file: path of the file.
        offset_bytes: where the bytes (encoded, if there is an encoding) begin in the file.
        n_bytes: their number, after decoding.
        encoding: None where the bytes in the file are the tensor's bytes.
    """

    file: str
    offset_bytes: int
    n_bytes: int
    encoding: Encoding | None = None


class StorageView(NamedTuple):
    """How a tensor lies in a storage that is larger than it, shared, or not contiguous. Units: elements."""

    offset: int
    stride: tuple[int, ...]


class TensorSpec(NamedTuple):
    """One tensor of a file.

    Attributes:
        key: its name in the file.
        dtype: type of its elements.
        shape: its shape in torch's count of elements (for F4, the last dimension is half the header's).
        region: the bytes of its storage. Tensors that share a storage have equal regions.
        view: None where the tensor is contiguous and is the whole region.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    region: Region
    view: StorageView | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of its elements: fewer than its region has where other elements lie between them."""
        return prod(self.shape) * self.dtype.itemsize


class Piece(NamedTuple):
    """One tensor of the files as a box of the fused tensor.

    Attributes:
        spec: the tensor.
        offset: index of its first element in the fused tensor, counted in elements.
        stride: distance of its elements along each of its dimensions there, in elements.
    """

    spec: TensorSpec
    offset: int
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its bytes follow each other in the fused tensor as they do in the file."""
        return self.stride == contiguous_stride(self.spec.shape) or prod(self.spec.shape) <= 1


class FusedSpec(NamedTuple):
    """A fused tensor: what a TensorSpec is for one that is in a file as it is needed.

    Attributes:
        key: name of the fused tensor.
        shape: its shape.
        pieces: what it is made of; every element belongs to exactly one.
    """

    key: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> DType:
        """The type that all its pieces have."""
        return self.pieces[0].spec.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of all pieces together."""
        return sum(piece.spec.n_bytes for piece in self.pieces)


class FileContents(NamedTuple):
    """All a file says of itself.

    Attributes:
        specs: its tensors, in the order of the file's own listing.
        metadata: text kept beside them (safetensors ``__metadata__``); empty for other formats.
        n_file_bytes: size of the file when it was read.
        modified_ns: when it was modified last, as it says (``st_mtime_ns``). With another size or time it is another
            file, of which nothing of the above can be believed.
        others: keys of the state dict whose values are no tensors (.bin only).
    """

    specs: tuple[TensorSpec, ...]
    metadata: dict[str, str]
    n_file_bytes: int
    modified_ns: int | None = None
    others: tuple[str, ...] = ()


@cache
def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
