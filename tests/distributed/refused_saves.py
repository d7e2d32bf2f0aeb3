"""Saves of several ranks of which one cannot do its part: how each rank ended, and what the folder holds then.

A program of its own, because it forks: ``python -m tests.distributed.refused_saves FOLDER``. It prints a JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from fastload.saver import save_checkpoint
from tests.distributed.forked import fork_ranks, join_group, laid_out
from tests.force.saves import generation_in, save, tensors_of

N_RANKS = 3
TIMEOUT_S = 20
SHORT_TIMEOUT_S = 1

Tensors = dict[str, Any]


def save_by_all(folder: Path, change: Callable[[Tensors], object] = len, **how: Any) -> None:
    """A save of generation 2, of tensors that were changed on this rank."""
    tensors = laid_out(tensors_of(2))
    change(tensors)
    save_checkpoint(tensors, folder, extra_files={"config.json": json.dumps({"generation": 2})}, **how)


def with_a_full_disk(folder: Path) -> None:
    # No file of this process may be larger than this, as if the disk were full.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, resource.RLIM_INFINITY))
    save_by_all(folder)


def on_meta(tensors: Tensors) -> None:
    whole = tensors["layer.0.weight"]
    part = torch.empty_like(whole.to_local(), device="meta")
    tensors["layer.0.weight"] = DTensor.from_local(
        part, whole.device_mesh, [Shard(0)], shape=whole.shape, stride=whole.stride()
    )


def of_another_type(tensors: Tensors) -> None:
    tensors |= {"layer.0.weight": tensors["layer.1.weight"]}


def partial_sum(tensors: Tensors) -> None:
    mesh = init_device_mesh("cpu", (N_RANKS,))
    tensors["sum"] = DTensor.from_local(torch.ones(4), mesh, [Partial()])


def interrupted(_: int) -> None:
    raise KeyboardInterrupt


def broken(_: int) -> None:
    raise RuntimeError("the bar is broken")


def never(folder: Path, rank: int) -> None:
    """A rank that does not take part."""
    join_group(folder, rank, N_RANKS, SHORT_TIMEOUT_S)
    time.sleep(2 * SHORT_TIMEOUT_S)


def late(folder: Path, rank: int) -> None:
    join_group(folder.parent, rank, N_RANKS, SHORT_TIMEOUT_S)
    save_by_all(folder)


Save = Callable[[Path], None]
FINE: Save = save_by_all


def cases(folder: Path) -> dict[str, list[Save]]:
    """What each rank does in each case."""
    elsewhere = folder.parent / "elsewhere"
    in_a_file = folder.parent / "file"
    in_a_file.write_text("")
    return {
        "disk full": [FINE, FINE, with_a_full_disk],
        "on meta": [FINE, partial(save_by_all, change=on_meta), FINE],
        "no tensor": [FINE, FINE, partial(save_by_all, change=lambda tensors: tensors.update(step="3"))],
        "other type": [FINE, partial(save_by_all, change=of_another_type), FINE],
        "part missing": [FINE, partial(save_by_all, change=lambda tensors: tensors.pop("layer.0.weight")), FINE],
        "sum": [partial(save_by_all, change=partial_sum)] * N_RANKS,
        "other folder": [FINE, lambda _: save_by_all(elsewhere), FINE],
        "a file": [lambda _: save_by_all(in_a_file)] * N_RANKS,
        "bad metadata": [partial(save_by_all, metadata={"a": "\udc80"})] * N_RANKS,
        "interrupted": [FINE, partial(save_by_all, progress=interrupted), FINE],
        "broken": [FINE, FINE, partial(save_by_all, progress=broken)],
        "broken, first": [partial(save_by_all, progress=broken), FINE, FINE],
        "two of them": [FINE, partial(save_by_all, progress=broken), partial(save_by_all, change=on_meta)],
        "bin": [partial(save_by_all, safe_serialization=False)] * N_RANKS,
        "incremental": [partial(save_by_all, incremental=True)] * N_RANKS,
        "fine": [FINE] * N_RANKS,
    }


def outcome(folder: Path, endings: list[str]) -> dict[str, Any]:
    return {"endings": endings, "generation": generation_in(str(folder)), "names": sorted(os.listdir(folder))}


def start_again(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    save(str(folder), 1, "3 safetensors")


def run(folder: Path, saves: list[Save]) -> dict[str, Any]:
    def act(rank: int) -> None:
        join_group(folder.parent, rank, N_RANKS, TIMEOUT_S)
        try:
            saves[rank](folder)
        finally:
            # The group is of use still: a rank that failed has told the others, and waits for none.
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            dist.barrier()

    start_again(folder)
    return outcome(folder, fork_ranks(folder.parent, [partial(act, rank) for rank in range(N_RANKS)], 2 * TIMEOUT_S))


def run_without(folder: Path) -> dict[str, Any]:
    """A save that rank 1 does not come to."""
    start_again(folder)
    actions = [partial(late, folder, 0), partial(never, folder.parent, 1), partial(late, folder, 2)]
    return outcome(folder, fork_ranks(folder.parent, actions, 10 * SHORT_TIMEOUT_S))


def run_without_a_group_of_the_processor(folder: Path) -> dict[str, Any]:
    """A group that has no messages of the processor's memory, as one of nccl."""

    def act(rank: int) -> None:
        where = f"file://{folder.parent}/rendezvous"
        dist.init_process_group("cuda:gloo", where, rank=rank, world_size=N_RANKS)
        save_by_all(folder)
        save_by_all(folder)

    start_again(folder)
    return outcome(folder, fork_ranks(folder.parent, [partial(act, rank) for rank in range(N_RANKS)], TIMEOUT_S))


def main() -> None:
    folder = Path(os.path.realpath(sys.argv[1])) / "out"
    found = {name: run(folder, saves) for name, saves in cases(folder).items()}
    found["absent"] = run_without(folder)
    found["no group of the processor"] = run_without_a_group_of_the_processor(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
