"""Reading once for all ranks of a machine: who reads what is agreed on, read, and handed over.

Every rank's plan is data, so that a list of boxes is all that is exchanged before the bytes themselves. Rounds are
small: the memory of a load is the tensors and some 40 MB for messages, whatever the size of the checkpoint. While one
round is handed over the next is read. A rank that fails says so in the place of its part, and all end with an error.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fastload.checkpoint import Checkpoint
from fastload.distributed.node import Node
from fastload.distributed.rounds import Exchange
from fastload.errors import OptionError
from fastload.formats.runs import asked_bytes
from fastload.plan.boxes import Box, box_in, narrow
from fastload.plan.dealing import Round, deal
from fastload.plan.rows import Action, FusedRow, LoadPlan, PlanRow
from fastload.progress import Progress
from fastload.reports import format_bytes

__all__ = ["ReadTogether", "read_together"]

# Messages of a round and what is read for it and the next, all together.
_MESSAGE_BYTES = 40 << 20
_MOST_ROUND_BYTES = 8 << 20
Row = TypeVar("Row", PlanRow, FusedRow)
_REASON = "read by one rank of the machine and handed to the others"


@dataclass(frozen=True, slots=True)
class ReadTogether:
    """What ranks of a machine have read for each other.

    Attributes:
        plan: this rank's plan, with the rows marked that were read so.
        left: the rows that were not.
        tensors: of the marked rows, by name.
        n_read_bytes: bytes of the files that this rank read, for all.
        note: what was decided.
    """

    plan: LoadPlan
    left: LoadPlan
    tensors: dict[str, torch.Tensor]
    n_read_bytes: int
    note: str

    @property
    def bytes_by_action(self) -> dict[str, int]:
        """Bytes in the files of the marked rows, by action."""
        n_bytes = sum(row.spec.n_bytes for row in self.plan.all_rows if row.action is Action.EXCHANGE)
        return {Action.EXCHANGE.value: n_bytes} if n_bytes else {}


def read_together(
    node: Node, plan: LoadPlan, checkpoint: Checkpoint, existing: Mapping[str, torch.Tensor]
) -> ReadTogether:
    """Agree with the other ranks of the machine on who reads what, read, hand over and receive.

    Nothing is if all files are in the page cache: then every rank maps the same pages.

    Args:
        node: these ranks; each of them calls this.
        plan: what this rank is to have.
        checkpoint: the files.
        existing: the module's own tensors, for rows that fill memory that is there.

    Raises:
        RankError: another rank has failed, or is gone.
        OptionError: they load different checkpoints.
        TruncatedFileError, UnreadableFileError, ChangedFileError: a file cannot be read; the others get a RankError.
    """
    rounds = _agree(node, plan, checkpoint)
    if rounds is None:
        return ReadTogether(plan, plan, {}, 0, "dedup: all is in the page cache, and mapped by each rank")
    dealt = {unit.key for one in rounds for units in one for unit in units if node.index in unit.wanted}
    marked, left = _marked(plan, dealt)
    exchange = Exchange(marked, node, checkpoint, existing)
    _carry_out(exchange, node, rounds)
    rest = [spec for key, spec in exchange.specs.items() if key not in dealt]
    exchange.read_alone(rest)
    units = [unit for one in rounds for unit in one[node.index]]
    n_read_bytes = sum(asked_bytes(narrow(checkpoint.specs[unit.key], unit.box)) for unit in units)
    n_read_bytes += sum(map(asked_bytes, rest))
    note = f"dedup: {format_bytes(n_read_bytes)} read for {len(node.ranks)} ranks of this machine"
    return ReadTogether(marked, left, exchange.tensors, n_read_bytes, f"{note}, in {len(rounds)} rounds")


def _agree(node: Node, plan: LoadPlan, checkpoint: Checkpoint) -> list[Round] | None:
    """Who reads what; None if all is in the page cache."""
    said = node.tell(
        {
            "files": [[os.path.basename(file), checkpoint.n_file_bytes(file)] for file in checkpoint.files],
            "is_cold": any(not checkpoint.open_file(file).is_warm() for file in checkpoint.files),
            "needs": _needs(plan, checkpoint),
        }
    )
    node.raise_for([one.get("error") for one in said])
    if any(one["files"] != said[0]["files"] for one in said):
        raise OptionError(
            "the ranks of a machine cannot share what they read of different checkpoints",
            found="; ".join(sorted({str(one["files"]) for one in said})),
            fix="have all ranks load the same checkpoint, or leave out dedup",
        )
    if not any(one["is_cold"] for one in said):
        return None
    needs = [{key: Box(*map(tuple, box)) for key, box in one["needs"].items()} for one in said]
    return deal(checkpoint.specs, needs, min(_MOST_ROUND_BYTES, _MESSAGE_BYTES // (len(needs) + 3)))


def _carry_out(exchange: Exchange, node: Node, rounds: Sequence[Round]) -> None:
    """All rounds; whatever fails on one rank, all come to the end of the same one."""
    error: BaseException | None = None
    with (
        ThreadPoolExecutor(1, "fastload-exchange") as reader,
        Progress("exchanging", exchange.n_bytes) as progress,
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        try:
            exchange.make()
        except BaseException as failure:  # noqa: BLE001  the others will know in the first round
            error = failure
        coming = [reader.submit(exchange.read, one) for one in rounds[:1]]
        for number, now in enumerate(rounds):
            try:
                if error is not None:
                    raise error
                reads = coming.pop().result()
                coming += [reader.submit(exchange.read, after) for after in rounds[number + 1 : number + 2]]
                messages = exchange.messages(now, reads)
            except BaseException as failure:  # noqa: BLE001  raised when the others know
                error = failure
                messages = exchange.signs_of_failure(now)
            received = node.swap(messages, exchange.inbox(now))
            if any(int(message[-1]) for message in received):
                node.raise_for(_errors(node, error))
            try:
                progress.advance(exchange.take(now, received))
            except BaseException as failure:  # noqa: BLE001  the others will know in the next round
                error = failure
        if error is not None:
            raise error


def _errors(node: Node, error: BaseException | None) -> list[str | None]:
    """What failed on each rank, told by all of them. Raises what failed on this one."""
    found = node.tell(None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    return found


def _needs(plan: LoadPlan, checkpoint: Checkpoint) -> dict[str, Box]:
    """What this rank needs of tensors that can be handed over in parts: key -> box."""
    specs = [spec for spec in plan.specs if spec.n_bytes]
    n_of_storage = Counter(checkpoint.specs[spec.key].region[:2] for spec in specs)
    needs = {}
    for spec in specs:
        whole = checkpoint.specs[spec.key]
        if whole.view is None and whole.region.encoding is None and n_of_storage[whole.region[:2]] == 1:
            needs[spec.key] = box_in(whole, spec)
    return needs


def _marked(plan: LoadPlan, dealt: set[str]) -> tuple[LoadPlan, LoadPlan]:
    """A plan with the rows marked that have a tensor that is dealt, and a plan of the others."""

    def mark(row: Row) -> Row:
        specs = [piece.spec for piece in row.spec.pieces] if isinstance(row, FusedRow) else [row.spec]
        is_dealt = any(spec.key in dealt for spec in specs)
        return row._replace(action=Action.EXCHANGE, reason=_REASON) if is_dealt else row

    marked = replace(plan, rows=tuple(map(mark, plan.rows)), fused=tuple(map(mark, plan.fused)))
    left = replace(
        plan,
        rows=tuple(row for row in marked.rows if row.action is not Action.EXCHANGE),
        fused=tuple(row for row in marked.fused if row.action is not Action.EXCHANGE),
    )
    return marked, left
