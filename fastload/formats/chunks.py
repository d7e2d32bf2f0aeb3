"""Parts of files as they travel to a device: what is read at once, and where its bytes go.

Pure data between the planning of a transfer (`fastload.plan.staging`) and what carries it out
(`fastload.storage.staging`).
"""

from __future__ import annotations

from typing import NamedTuple

from fastload.dtypes import DType

__all__ = ["Chunk", "Part", "Read"]


class Read(NamedTuple):
    """A run of bytes of a file and its place in a slot.

    Attributes:
        offset_bytes: where it begins in the file.
        n_bytes: its length.
        at_bytes: where it begins in the slot; as far behind the beginning of a page as in the file, so that the page
            cache can be passed by. No two reads share a page of the slot.
    """

    offset_bytes: int
    n_bytes: int
    at_bytes: int


class Part(NamedTuple):
    """Bytes of a slot that go to one place on the device, as one copy.

    Attributes:
        at_bytes: where they begin in the slot.
        n_bytes: their number.
        buffer: number of the device buffer they belong into.
        offset_bytes: where they begin there.
        source: type of the elements in the slot.
        dtype: type of the elements in the buffer.
        shape: shape of a box whose elements do not follow each other in the buffer; empty otherwise.
        stride: distance of the box's elements along each dimension, in elements; empty otherwise.
    """

    at_bytes: int
    n_bytes: int
    buffer: int
    offset_bytes: int
    source: DType
    dtype: DType
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """The bytes are copied as they are, one after another."""
        return self.source is self.dtype and not self.stride


class Chunk(NamedTuple):
    """What is read into one slot.

    Attributes:
        file: the file.
        group: number of the group that all its parts belong to.
        reads: what is read, in the order of the file.
        parts: where the bytes go.
    """

    file: str
    group: int
    reads: tuple[Read, ...]
    parts: tuple[Part, ...]

    @property
    def n_read_bytes(self) -> int:
        """Bytes of all reads, with what lies between the parts."""
        return sum(read.n_bytes for read in self.reads)

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.n_bytes for part in self.parts)
