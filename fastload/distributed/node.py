"""The ranks of one machine, and messages between them.

Messages go from rank to rank over the process group that is there: no group is made, so that no rank of another machine
takes part. Both ends order their messages to each other by rank; that is what NCCL needs, whose sends wait for the
other end, and takes nothing from gloo.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fastload.errors import OptionError, RankError

__all__ = ["Node", "join_node"]

# Of messages between these ranks that others may be sending meanwhile, none has this tag.
_TAG = 0x0FA57


class Node:
    """The ranks of this machine, as one of them sees it.

    Attributes:
        ranks: their numbers in the process group, in ascending order.
        index: which of them this one is.
        device: where messages lie.
        has_met: they have begun to talk, and know of each other's failures.
    """

    def __init__(self, ranks: Sequence[int], device: torch.device) -> None:
        self.ranks = tuple(ranks)
        self.index = self.ranks.index(dist.get_rank())
        self.device = device
        self.has_met = False

    def swap(self, messages: Sequence[torch.Tensor], received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Send a message to each rank and receive one of each. What this rank has for itself it gets as it is.

        Args:
            messages: flat tensors of bytes, none empty, one for each rank of the machine.
            received: such tensors on the node's device, as long as what each of them will send.

        Raises:
            RankError: one of them is gone.
        """
        self.has_met = True
        try:
            under_way = []
            for peer, rank in enumerate(self.ranks):
                if peer == self.index:
                    continue
                if peer < self.index:
                    under_way.append(dist.irecv(received[peer], rank, tag=_TAG))
                under_way.append(dist.isend(messages[peer].to(self.device), rank, tag=_TAG))
                if peer > self.index:
                    under_way.append(dist.irecv(received[peer], rank, tag=_TAG))
            for work in under_way:
                assert work is not None
                work.wait()
        except RuntimeError as error:
            raise RankError("a rank of this machine is gone", found=str(error).splitlines()[0]) from error
        return [messages[peer] if peer == self.index else text for peer, text in enumerate(received)]

    def tell(self, said: Any) -> list[Any]:
        """Tell all the ranks something that JSON has, and hear what each of them has to say. RankError as `swap`."""
        text = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)]).view(torch.uint8)
        n = len(self.ranks)
        lengths = self.swap([length] * n, [self._bytes(len(length)) for _ in range(n)])
        texts = self.swap([text] * n, [self._bytes(int(found.cpu().view(torch.int64))) for found in lengths])
        return [json.loads(found.cpu().numpy().tobytes()) for found in texts]

    def _bytes(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Have the others know of a failure in here that comes before they have met; they wait for this rank."""
        try:
            yield
        except BaseException as error:
            if not self.has_met:
                self.tell({"error": str(error) or type(error).__name__})
            raise

    def raise_for(self, errors: Sequence[str | None]) -> None:
        """Raise RankError for the first of the ranks' errors that is not None."""
        for rank, error in zip(self.ranks, errors, strict=True):
            if error is not None:
                raise RankError("another rank of this machine failed to load", found=f"rank {rank}: {error}")


def join_node(device: str | None) -> Node:
    """The ranks of this rank's machine: as torchrun says, otherwise those with its host name.

    Without torchrun (``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``) host names are exchanged by all ranks of the group.

    Args:
        device: where this rank's weights go; None for the CPU.

    Raises:
        OptionError: there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise OptionError(
            "ranks can share what they read only in a process group",
            key="dedup",
            fix="call torch.distributed.init_process_group first, or leave out dedup",
        )
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    try:
        first, n_local = rank - int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        names: list[str] = [""] * n_ranks
        dist.all_gather_object(names, socket.gethostname())
        ranks = [number for number, name in enumerate(names) if name == names[rank]]
    else:
        ranks = list(range(first, first + n_local))
        if rank not in ranks or first < 0 or first + n_local > n_ranks:
            raise OptionError(
                "LOCAL_RANK and LOCAL_WORLD_SIZE do not fit the process group",
                expected=f"ranks of one machine among 0 to {n_ranks - 1}",
                found=f"rank {rank} with ranks {first} to {first + n_local - 1}",
            )
    return Node(ranks, torch.device(device or "cpu"))
