"""Ranks of process groups that are forked from a process that has imported torch: a group costs a moment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # which torch imports when a DTensor is made: once here, and not in every process that is forked
import torch.distributed as dist
import torch.distributed.fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

__all__ = ["NO_END", "fork_ranks", "join_group", "laid_out"]

NO_END = "no end"


def join_group(folder: Path, rank: int, n_ranks: int, timeout_s: float) -> None:
    """Make the default process group."""
    torch.set_num_threads(1)
    where = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", where, timedelta(seconds=timeout_s), rank=rank, world_size=n_ranks)


def laid_out(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors cut along their first dimension, for all ranks; those of one element as they are."""
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (n_ranks,))
    made = dict(tensors)
    for key, value in tensors.items():
        if value.numel() != 1:
            parts = [*value.chunk(n_ranks), *[value[:0]] * n_ranks]
            made[key] = DTensor.from_local(parts[rank], mesh, [Shard(0)], shape=value.shape, stride=value.stride())
    return made


def fork_ranks(folder: Path, actions: list[Callable[[], object]], timeout_s: float) -> list[str]:
    """Do something in a process for each rank.

    Args:
        folder: for the rendezvous and the findings.
        actions: one for each rank.
        timeout_s: after this, processes are killed.

    Returns:
        How each ended: "done", the text of its error, or ``NO_END``.
    """
    (folder / "rendezvous").unlink(missing_ok=True)
    found = [folder / f"found-{rank}" for rank in range(len(actions))]
    for path in found:
        path.unlink(missing_ok=True)
    _wait_for([_start(action, path) for action, path in zip(actions, found, strict=True)], timeout_s)
    return [path.read_text() if path.exists() else NO_END for path in found]


def _start(action: Callable[[], object], found: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            action()
            text = "done"
        except BaseException as error:  # noqa: BLE001  reported
            text = f"{type(error).__name__}: {error}"
        found.write_text(text)
        os._exit(0)
    return pid


def _wait_for(pids: list[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    left = set(pids)
    while left:
        for pid in [*left]:
            if os.waitpid(pid, os.WNOHANG)[0]:
                left.remove(pid)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
