"""Process groups of gloo on this machine: a module run as so many ranks, and what each of them found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 120
Findings = dict[str, Any]


def run_group(module: str, n_ranks: int, folder: Path) -> list[Findings]:
    """Run a module of which `be_a_rank` is the main function as a group; what each rank found."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(n_ranks), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n_ranks)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
        # The rank that failed first took others with it.
        assert not any(process.returncode for process in processes), "\n".join(errors)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"findings-{rank}.pt") for rank in range(n_ranks)]


def be_a_rank(find: Callable[[Path, int], Findings]) -> None:
    """Join the group that the command line names, and write what ``find(folder, n_ranks)`` finds there."""
    rank, n_ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    torch.save(find(folder, n_ranks), folder / f"findings-{rank}.pt")
    dist.destroy_process_group()
