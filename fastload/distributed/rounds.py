"""What one rank does in rounds of reading for others: read, pack, receive, put into place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from fastload.checkpoint import Checkpoint
from fastload.distributed.node import Node
from fastload.dtypes import to_torch
from fastload.formats.runs import runs_of
from fastload.formats.specs import TensorSpec
from fastload.plan.boxes import Box, box_in, narrow
from fastload.plan.dealing import Round, Unit
from fastload.plan.rows import Action, FusedRow, LoadPlan, PlanRow
from fastload.storage.reading import ReadFile

__all__ = ["Exchange"]

_ALIGNMENT = 16


class _Place(NamedTuple):
    """Where a part of a unit is in a message.

    Attributes:
        offset_bytes: where it begins there.
        number: of the unit among those of the round that the sender reads.
        part: the box of the tensor.
        n_bytes: its size.
    """

    offset_bytes: int
    number: int
    part: Box
    n_bytes: int


class _Arena:
    """Memory that is lent again and again, so that it is taken from the system once."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def lend(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Flat tensors of so many bytes. What was lent before is lent anew."""
        offsets = [0]
        for n_bytes in sizes:
            offsets.append(offsets[-1] + -(-n_bytes // _ALIGNMENT) * _ALIGNMENT)
        if offsets[-1] > len(self._memory):
            device = self._memory.device
            del self._memory  # first, or both would be there
            self._memory = torch.empty(offsets[-1], dtype=torch.uint8, device=device)
        return [self._memory[begin : begin + n_bytes] for begin, n_bytes in zip(offsets, sizes, strict=False)]


class Exchange:
    """One rank's part in the rounds.

    Attributes:
        tensors: what this rank is to have, by name, once it is made.
        specs: what that is made of, by key.

    Args:
        plan: its rows to be exchanged are marked.
        node: the ranks.
        checkpoint: the files.
        existing: the module's own tensors, for rows that fill memory that is there.
    """

    def __init__(
        self, plan: LoadPlan, node: Node, checkpoint: Checkpoint, existing: Mapping[str, torch.Tensor]
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._plan = plan
        self._node = node
        self._checkpoint = checkpoint
        self._existing = existing
        self._files: dict[str, ReadFile] = {}
        # key -> the box of it that this rank has, and where that goes
        self._targets: dict[str, tuple[Box, torch.Tensor]] = {}
        # What is read for the next round must not disturb what is sent of this one.
        self._read, self._read_next = _Arena(), _Arena()
        self._outbox, self._inbox = _Arena(), _Arena(node.device)

    @property
    def n_bytes(self) -> int:
        """Bytes in the files of what this rank is to have."""
        return sum(row.spec.n_bytes for row in self._plan.all_rows if row.action is Action.EXCHANGE)

    def make(self) -> None:
        """Memory for what this rank is to have."""
        for row in self._plan.all_rows:
            if row.action is Action.EXCHANGE:
                self._make(row)

    def read(self, now: Round) -> list[torch.Tensor]:
        """What this rank reads in a round; it stays until the round after the next is read."""
        specs = [narrow(self._checkpoint.specs[unit.key], unit.box) for unit in now[self._node.index]]
        self._read, self._read_next = self._read_next, self._read
        lent = self._read.lend([runs_of(spec).n_read_bytes for spec in specs])
        return [self._file(spec).part(spec, into) for spec, into in zip(specs, lent, strict=True)]

    def messages(self, now: Round, reads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What this rank has for each of them; those who get the same share it. The last byte says: it did not fail."""
        mine = now[self._node.index]
        places = [self._places(mine, peer) for peer in range(len(self._node.ranks))]
        distinct = {tuple(one): one for one in places}
        lent = self._outbox.lend([_n_message_bytes(one) for one in distinct.values()])
        messages = dict(zip(distinct, lent, strict=True))
        for same, message in messages.items():
            message[-1] = 0
            for place in distinct[same]:
                unit = mine[place.number]
                self._typed(message, unit, place).copy_(_within(reads[place.number], unit.box, place.part))
        return [messages[tuple(one)] for one in places]

    def signs_of_failure(self, now: Round) -> list[torch.Tensor]:
        """What the others get of a rank that has failed."""
        places = [self._places(now[self._node.index], peer) for peer in range(len(self._node.ranks))]
        messages = self._outbox.lend([_n_message_bytes(one) for one in places])
        for message in messages:
            message[-1] = 1
        return messages

    def take(self, now: Round, received: Sequence[torch.Tensor]) -> int:
        """Put what was received in a round into its place. Returns its bytes in the files."""
        n_bytes = 0
        for units, message in zip(now, received, strict=True):
            for place in self._places(units, self._node.index):
                unit = units[place.number]
                box, target = self._targets[unit.key]
                _within(target, box, place.part).copy_(self._typed(message, unit, place))
                n_bytes += place.n_bytes
        return n_bytes

    def read_alone(self, specs: Iterable[TensorSpec]) -> None:
        """Read what nobody else needs: pieces of fused tensors of which others need other pieces."""
        with torch.no_grad():
            for spec in specs:
                self._targets[spec.key][1].copy_(self._file(spec).part(spec))

    def inbox(self, now: Round) -> list[torch.Tensor]:
        """Memory for each rank's message to this one."""
        return self._inbox.lend([_n_message_bytes(self._places(units, self._node.index)) for units in now])

    def _places(self, units: Sequence[Unit], peer: int) -> list[_Place]:
        """Where in a message to a rank the parts of these units are."""
        places: list[_Place] = []
        end = 0
        for number, unit in enumerate(units):
            part = unit.wanted.get(peer)
            if part is not None:
                n_bytes = self._checkpoint.specs[unit.key]._replace(shape=part.shape).n_bytes
                places.append(_Place(end, number, part, n_bytes))
                end += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        return places

    def _make(self, row: PlanRow | FusedRow) -> None:
        if row.device:
            made = torch.empty(row.spec.shape, dtype=to_torch(row.dtype), device=row.device)
        else:
            made = self._existing[row.fqn]
        self.tensors[row.fqn] = made
        for spec, target in _targets(row, made):
            self._targets[spec.key] = box_in(self._checkpoint.specs[spec.key], spec), target
            self.specs[spec.key] = spec

    def _typed(self, message: torch.Tensor, unit: Unit, place: _Place) -> torch.Tensor:
        dtype = to_torch(self._checkpoint.specs[unit.key].dtype)
        return message[place.offset_bytes : place.offset_bytes + place.n_bytes].view(dtype).view(place.part.shape)

    def _file(self, spec: TensorSpec) -> ReadFile:
        path = spec.region.file
        if path not in self._files:
            n_file_bytes, modified_ns = self._checkpoint.n_file_bytes(path), self._checkpoint.modified_ns(path)
            self._files[path] = ReadFile(path, n_file_bytes, modified_ns)
        return self._files[path]


def _targets(row: PlanRow | FusedRow, made: torch.Tensor) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """The tensors of the files that a row is made of, each with its place in the row's tensor."""
    if isinstance(row, PlanRow):
        yield row.spec, made
        return
    for piece in row.spec.pieces:
        yield piece.spec, made.as_strided(piece.spec.shape, piece.stride, made.storage_offset() + piece.offset)


def _within(tensor: torch.Tensor, box: Box, part: Box) -> torch.Tensor:
    """A part of what a tensor has of another one: both boxes are of that."""
    for dim, (begin, first, size) in enumerate(zip(part.offset, box.offset, part.shape, strict=True)):
        tensor = tensor.narrow(dim, begin - first, size)
    return tensor


def _n_message_bytes(places: Sequence[_Place]) -> int:
    """Bytes of a message: its parts, and one for the state of who sends it."""
    return (places[-1].offset_bytes + places[-1].n_bytes if places else 0) + 1
