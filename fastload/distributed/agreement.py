"""Ranks of a process group that do something step by step, and go on only if all of them could.

Rank 0 hears from every rank how a step went, and answers each. Messages go between two ranks at a time: where one of
them is gone the other knows at once, and can still tell the rest, whereas a collective leaves them waiting for the
timeout. They are small, and of the processor's memory.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from fastload.errors import FastloadError, OptionError, SaveError

__all__ = ["Ranks"]

T = TypeVar("T")
U = TypeVar("U")

# Keeps these messages apart from those that the program sends on the same group.
_TAG = 0x0FA5710A
_CPU = torch.device("cpu")
# Beside a default group that has no messages of the processor's memory (nccl): one that has.
_BESIDE: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


class Failure(NamedTuple):
    """Why a rank could not do its part."""

    rank: int
    cause: str
    file: str | None = None
    fix: str | None = None


class Ranks:
    """All ranks of the default process group.

    Made by all of them at the same point of the program.

    Attributes:
        rank: this one's number.
        n_ranks: how many there are.

    Raises:
        OptionError: there is no process group.
    """

    def __init__(self) -> None:
        if not dist.is_initialized():
            raise OptionError(
                "tensors are laid out over ranks, and there is no process group",
                fix="save before torch.distributed.destroy_process_group is called",
            )
        self._group = _group_of_the_processor()
        self.rank, self.n_ranks = dist.get_rank(), dist.get_world_size()

    def step(self, own: Callable[[], T], decide: Callable[[list[T]], Sequence[U]]) -> U:
        """Have every rank do its part, and rank 0 answer them.

        Args:
            own: this rank's part. What it returns goes to rank 0.
            decide: called on rank 0 with what all ranks returned; returns an answer for each.

        Returns:
            The answer to this rank.

        Raises:
            SaveError: a rank could not do its part, did not answer within the group's timeout, or is gone; or rank 0
                could not decide. It is raised on all ranks.
            FastloadError: of another kind, on the rank where it was raised, in the place of that.
        """
        result, error = _attempt(own)
        if self.rank:
            failure = None if error is None else _failure(self.rank, error)
            answer, failures = self._ask((result, failure))
        else:
            answer, failures, error = self._lead(result, error, decide)
        if not failures:
            return cast(U, answer)
        if error is not None and (isinstance(error, FastloadError) != isinstance(error, SaveError)):
            raise error
        if error is not None and not isinstance(error, Exception):
            raise error
        raise SaveError(
            f"the save was given up, because rank {failures[0].rank} failed",
            file=failures[0].file,
            found="; ".join(f"rank {failure.rank}: {failure.cause}" for failure in failures),
            fix=failures[0].fix or "see what that rank said",
        ) from error

    def _lead(
        self, result: Any, error: BaseException | None, decide: Callable[[list[Any]], Sequence[Any]]
    ) -> tuple[Any, list[Failure], BaseException | None]:
        """Rank 0's side of a step: its own answer, who failed, and its own error."""
        failures = [] if error is None else [_failure(0, error)]
        results, lost = [result], []
        for rank in range(1, self.n_ranks):
            try:
                its_result, its_failure = self._receive(rank)
            except RuntimeError as silence:
                lost.append(Failure(rank, _silence(silence), fix=_FIX_SILENCE))
                continue
            results.append(its_result)
            failures += [] if its_failure is None else [its_failure]
        # Where one did not answer in time all connections are closed, so that others are lost with it.
        failures += lost[:1]
        answers: Sequence[Any] = [None] * self.n_ranks
        if not failures:
            try:
                answers = decide(results)
            except BaseException as problem:  # noqa: BLE001  raised by step, on all ranks
                error = problem
                failures = [_failure(0, problem)]
        gone = {failure.rank for failure in lost}
        for rank in range(1, self.n_ranks):
            if rank not in gone:
                try:
                    self._send(rank, (answers[rank], failures))
                except RuntimeError:
                    continue  # it is gone since: the next step tells
        return answers[0], failures, error

    def _ask(self, report: Any) -> Any:
        """Another rank's side: rank 0's answer to it, and who failed."""
        try:
            self._send(0, report)
            return self._receive(0)
        except RuntimeError as silence:
            return None, [Failure(0, _silence(silence), fix=_FIX_SILENCE)]

    def _send(self, rank: int, message: Any) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        dist.send(torch.tensor([len(data)]), rank, group=self._group, tag=_TAG)
        dist.send(data, rank, group=self._group, tag=_TAG)

    def _receive(self, rank: int) -> Any:
        n_bytes = torch.zeros(1, dtype=torch.int64)
        dist.recv(n_bytes, rank, group=self._group, tag=_TAG)
        data = torch.empty(int(n_bytes), dtype=torch.uint8)
        dist.recv(data, rank, group=self._group, tag=_TAG)
        return pickle.loads(data.numpy().data)  # from a process of the same program


_FIX_SILENCE = "look for what ended that rank; the folder loads as before, or as the new checkpoint, never as a mixture"


def _attempt(own: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return own(), None
    except BaseException as error:  # noqa: BLE001  raised by step, once the other ranks know
        return None, error


def _failure(rank: int, error: BaseException) -> Failure:
    if isinstance(error, FastloadError):
        details = [error.problem, *(f"{detail}" for detail in (error.key, error.found) if detail is not None)]
        return Failure(rank, ": ".join(details), error.file, error.fix)
    return Failure(rank, f"{type(error).__name__}: {error}")


def _silence(error: RuntimeError) -> str:
    """What gloo says of a rank that is gone, without the place in its source and its guess at the cause."""
    text = re.sub(r"^\[[^\]]*\] *", "", str(error)).split(". ")[0]
    return f"it did not answer ({text.splitlines()[0] if text else type(error).__name__})"


def _group_of_the_processor() -> dist.ProcessGroup:
    """The default group if it has messages of the processor's memory, or else a gloo group of the same ranks."""
    default = dist.group.WORLD
    assert default is not None, "there are DTensors, so there is a process group"
    try:
        default._get_backend(_CPU)
    except RuntimeError:
        if default not in _BESIDE:
            _BESIDE[default] = dist.new_group(backend="gloo", timeout=_timeout(default))
        return _BESIDE[default]
    return default


def _timeout(group: dist.ProcessGroup) -> Any:
    """The timeout that the program gave the group; None for the default of the new one."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout
    return None
