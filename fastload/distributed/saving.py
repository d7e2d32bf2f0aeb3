"""One ordinary checkpoint, saved by all ranks of a process group from DTensors.

Rank 0 hears what each rank has, lays out the files, makes them under temporary names and tells each rank its share.
Every rank writes its share into the same files, each byte once, and no tensor is ever gathered. When all have written,
checksums are made of what the files hold now, since a block of a tensor may have been written by several ranks; rank 0
puts them into the headers and commits as a save by one process does, and the files are the same to the byte.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import torch

from fastload.distributed.agreement import Ranks
from fastload.distributed.parts import Part, held_of, narrowed
from fastload.errors import FormatError, SaveError, UnreadableFileError
from fastload.formats.checksums import BLOCK_BYTES, n_blocks, seal
from fastload.options import Durability
from fastload.plan.shares import Block, Held, Share, assemble, runs, share_blocks, share_out
from fastload.sources.commit import FolderCommit
from fastload.storage.atomic import save_error, sync_file
from fastload.storage.devices import Devices, device_for
from fastload.storage.hashing import file_checksums
from fastload.storage.unloading import unload
from fastload.storage.writing import RegionWriter, tensor_bytes

__all__ = ["Target", "save_together"]

T = TypeVar("T")

# What is copied at a time of a part that is not contiguous.
_COPY_BYTES = 16 << 20


class Target(NamedTuple):
    """A file to be.

    Attributes:
        header: its first bytes, with zeros for the checksums.
        offsets: where in the file each tensor begins, ascending.
    """

    header: bytes
    offsets: Mapping[str, int]


Conclude: TypeAlias = Callable[[FolderCommit, Mapping[str, str]], T]
LayOut: TypeAlias = Callable[
    [Mapping[str, torch.Tensor], Mapping[str, Hashable]], tuple[Mapping[str, Target], Conclude[T]]
]


class _Write(NamedTuple):
    """A share, the number of its file, and where in it the share's tensor begins."""

    file: int
    offset_bytes: int
    share: Share


class _Task(NamedTuple):
    """What a rank is to do.

    Attributes:
        files: names of all files, to be and as they are now.
        writes: its shares, by file.
        blocks: (number of the file, offset, bytes) of the blocks to make checksums of, ascending.
    """

    files: list[tuple[str, str]]
    writes: list[_Write]
    blocks: list[tuple[int, int, int]]


def save_together(
    collect: Callable[[], Mapping[str, Part]],
    folder: str,
    lay_out: LayOut[T],
    *,
    durability: Durability,
    progress: Callable[[int], None] | None = None,
    devices: Devices = device_for,
) -> T:
    """Save what all ranks of the default process group have; called by each of them.

    Args:
        collect: this rank's parts by key.
        folder: of the checkpoint, which all ranks see.
        lay_out: called on rank 0, with tensors on the meta device by key, and what is equal for those that are the same
            memory. Returns the files by name, and what to call when they are complete: with the save and the checksum
            of each file it adds what else belongs to the checkpoint, and commits.
        durability: what each rank waits for.
        progress: called with the number of bytes whenever this rank wrote some.
        devices: the device of a name, for parts that are copied out while others are written.

    Returns:
        What was returned on rank 0 by the call that commits.

    Raises:
        SaveError: on all ranks, if one of them failed or is gone.
    """
    ranks = Ranks()
    parts: dict[str, Part] = {}

    def describe() -> dict[str, Held]:
        parts.update(collect())
        return held_of(parts)

    with ExitStack() as closing:
        lead = _Lead(lay_out, FolderCommit(folder, durability=durability, progress=progress), closing)
        task = ranks.step(describe, lead.assign)
        writing = _Writing(folder, parts, durability != "none", progress, devices)
        ranks.step(lambda: writing.write_all(task, ranks), lambda found: found)
        return ranks.step(lambda: _checksums(task, folder), lead.conclude)


class _Lead(Generic[T]):
    """Rank 0's side of a save: what it decides from what all ranks said."""

    def __init__(self, lay_out: LayOut[T], commit: FolderCommit, closing: ExitStack) -> None:
        self._lay_out = lay_out
        self._commit = commit
        self._closing = closing
        self._targets: Mapping[str, Target] = {}
        self._conclude: Conclude[T] | None = None
        self._n_blocks: list[int] = []
        self._numbers: list[list[int]] = []

    def assign(self, held: Sequence[Mapping[str, Held]]) -> list[_Task]:
        """Lay out the files, make them, and share out the work."""
        wholes = assemble(held)
        likenesses = {
            key: torch.empty(whole.shape, dtype=getattr(torch, whole.dtype), device="meta")
            for key, whole in wholes.items()
        }
        self._targets, self._conclude = self._lay_out(likenesses, {key: whole.memory for key, whole in wholes.items()})
        place_of = {
            key: (number, offset)
            for number, target in enumerate(self._targets.values())
            for key, offset in target.offsets.items()
        }
        stored = {key: wholes[key] for key in place_of}  # in the order of the files
        shares = share_out(stored, len(held))
        blocks: list[Block] = []
        for target in self._targets.values():
            before = len(blocks)
            blocks += [block for key in target.offsets for block in _blocks(key, likenesses[key].nbytes)]
            self._n_blocks.append(len(blocks) - before)
        self._numbers = share_blocks(blocks, stored, shares, BLOCK_BYTES)
        self._closing.enter_context(self._commit)
        files = []
        for name, target in self._targets.items():
            n_bytes = len(target.header) + sum(likenesses[key].nbytes for key in target.offsets)
            files.append((name, self._commit.reserve(name, n_bytes)))
        tasks = []
        for own, numbers in zip(shares, self._numbers, strict=True):
            writes = sorted(_Write(*place_of[share.key], share) for share in own)
            places = [(*place_of[blocks[number].key], blocks[number]) for number in numbers]
            tasks.append(_Task(files, writes, [(file, at + block.begin, block.n_bytes) for file, at, block in places]))
        return tasks

    def conclude(self, checksums: Sequence[Sequence[str]]) -> list[T]:
        """Put the checksums into the headers and commit."""
        assert self._conclude is not None, "assign comes first"
        found = [""] * sum(self._n_blocks)
        for numbers, own in zip(self._numbers, checksums, strict=True):
            for number, checksum in zip(numbers, own, strict=True):
                found[number] = checksum
        of_files = {}
        coming = iter(found)
        for (name, target), n in zip(self._targets.items(), self._n_blocks, strict=True):
            header, of_files[name] = seal(target.header, [*islice(coming, n)])
            with self._commit.finish(name) as writer:
                writer.write(header)
        return [self._conclude(self._commit, of_files)] * len(checksums)


def _blocks(key: str, n_bytes: int) -> Iterator[Block]:
    for begin in range(0, n_bytes, BLOCK_BYTES):
        yield Block(key, begin, min(BLOCK_BYTES, n_bytes - begin))


class _Writing:
    """How a rank writes its shares."""

    def __init__(
        self,
        folder: str,
        parts: Mapping[str, Part],
        syncs: bool,
        progress: Callable[[int], None] | None,
        devices: Devices,
    ) -> None:
        self._folder = folder
        self._parts = parts
        self._syncs = syncs
        self._progress = progress
        self._devices = devices

    def write_all(self, task: _Task, ranks: Ranks) -> None:
        """Write a rank's shares, each file as durable as is asked."""
        files = [(number, [*writes]) for number, writes in groupby(task.writes, lambda write: write.file)]
        # Each rank begins with another file, since a file takes the writes of one at a time.
        first = len(files) * ranks.rank // ranks.n_ranks
        for number, writes in (*files[first:], *files[:first]):
            path, temporary = (os.path.join(self._folder, name) for name in task.files[number])
            try:
                with RegionWriter(_open(path, temporary), self._progress) as writer:
                    self._write(writer, writes)
                    writer.flush()
                    if self._syncs:
                        sync_file(writer.sync)
            except OSError as error:
                raise error if isinstance(error, SaveError) else save_error(path, error) from error

    def _write(self, writer: RegionWriter, writes: Sequence[_Write]) -> None:
        own = [narrowed(self._parts[write.share.key], write.share.box) for write in writes]
        device_of = {name: self._devices(name) for name in {str(tensor.device) for tensor in own}}
        with ExitStack() as unloading:
            coming: dict[str, Iterator[memoryview]] = {}
            for name, device in device_of.items():
                if device is not None:
                    pieces = unload([tensor for tensor in own if str(tensor.device) == name], device, BLOCK_BYTES)
                    unloading.callback(pieces.close)
                    coming[name] = pieces
            for write, tensor in zip(writes, own, strict=True):
                name = str(tensor.device)
                data: Iterable[memoryview] = _pieces(tensor)
                if name in coming:
                    data = _lent(islice(coming[name], n_blocks(tensor.nbytes)), writer)
                places = runs(self._parts[write.share.key].shape, write.share.box, tensor.element_size())
                _write_runs(writer, data, ((write.offset_bytes + begin, n) for begin, n in places))


def _lent(pieces: Iterable[memoryview], writer: RegionWriter) -> Iterator[memoryview]:
    """Pieces of memory that is used again, each written before the next one is asked for."""
    for piece in pieces:
        yield piece
        writer.flush()


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in row-major order; of one that is not contiguous, copies of a few rows at a time."""
    if (tensor.is_contiguous() and tensor.device.type == "cpu") or tensor.nbytes <= _COPY_BYTES:
        yield tensor_bytes(tensor)
    elif len(tensor) == 1:
        yield from _pieces(tensor[0])
    else:
        n_rows = max(1, len(tensor) * _COPY_BYTES // tensor.nbytes)
        for begin in range(0, len(tensor), n_rows):
            yield from _pieces(tensor[begin : begin + n_rows])


def _write_runs(writer: RegionWriter, data: Iterable[memoryview], places: Iterator[tuple[int, int]]) -> None:
    """Write bytes as they come to (offset, number) one after the other."""
    offset, room = 0, 0
    for piece in data:
        at = 0
        while at < piece.nbytes:
            if not room:
                offset, room = next(places)
            n_bytes = min(room, piece.nbytes - at)
            writer.write_at(offset, piece[at : at + n_bytes])
            offset, room, at = offset + n_bytes, room - n_bytes, at + n_bytes


def _open(path: str, temporary: str) -> int:
    try:
        return os.open(temporary, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SaveError(
            "this rank does not see the file that rank 0 made for all ranks to write",
            file=path,
            fix="save to a folder that is the same on all nodes, such as one of a network file system",
        ) from error


def _checksums(task: _Task, folder: str) -> list[str]:
    """Checksums of this rank's blocks, as they are in the files now that all ranks have written."""
    found: list[str] = []
    for number, blocks in groupby(task.blocks, lambda block: block[0]):
        path, temporary = (os.path.join(folder, name) for name in task.files[number])
        try:
            found += file_checksums(temporary, [block[1:] for block in blocks], lambda _: None)
        except (FormatError, UnreadableFileError) as error:
            raise SaveError("a file that was just written could not be read", file=path, found=error.found) from error
    return found
