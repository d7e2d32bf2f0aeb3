"""A program for torchrun whose second rank fails while it loads: a file is gone, or the process is killed.

torchrun --nproc-per-node 2 -m tests.distributed.failing_load FOLDER missing|killed
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fastload
from tests.distributed.layouts import Net, fully_sharded

TIMEOUT_S = 60


def main() -> None:
    folder, way = Path(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    rank = dist.get_rank()
    with torch.device("meta"):
        net = fully_sharded(Net(), init_device_mesh("cpu", (dist.get_world_size(),)))
    end = time.monotonic() + TIMEOUT_S
    while rank == 1 and not (folder / "loaded-0").exists() and time.monotonic() < end:
        time.sleep(0.01)  # torchrun would end the first rank, on a busy machine, before it has loaded
    if rank == 1 and way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    fastload.load_model(net, folder / ("checkpoint" if rank == 0 else "not there"))
    (folder / f"loaded-{rank}").touch()
    fastload.save_model(net, folder / "out")


if __name__ == "__main__":
    main()
