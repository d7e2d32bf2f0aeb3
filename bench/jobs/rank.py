"""One rank of a group: ``rank.py LOADER RANK N_RANKS RENDEZVOUS FOLDER TINY``.

It loads the tiny model, and then the other. Of that load it says the seconds between two barriers, those until one
byte of every page of its parts was read too, how its private memory grew, and the digest of its parts.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from suite.fingerprint import fingerprint
from suite.memory import private_bytes
from suite.ranks import RANK_LOADERS, local_parts

_PAGE_BYTES = 4096
_TIMEOUT = timedelta(minutes=5)


def main(loader: str, rank: int, n_ranks: int, rendezvous: str, folder: Path, tiny: Path) -> None:
    """Load twice, and tell of the second load."""
    torch.set_num_threads(1)
    # As torchrun tells it; transformers goes by these.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=n_ranks, timeout=_TIMEOUT)
    load = RANK_LOADERS[loader]
    _measured(load, tiny)
    print(json.dumps(_measured(load, folder)), flush=True)
    dist.destroy_process_group()


def _measured(load: Any, folder: Path) -> dict[str, Any]:
    gc.collect()
    before = private_bytes()
    dist.barrier()
    begun = perf_counter()
    model = load(folder)
    dist.barrier()
    seconds = perf_counter() - begun
    parts = local_parts(model)
    for tensor in parts.values():
        tensor.reshape(-1).view(torch.uint8)[::_PAGE_BYTES].max()
    dist.barrier()
    seconds_touched = perf_counter() - begun
    grown = private_bytes() - before
    metrics = {"seconds": seconds, "touched_s": seconds_touched, "private_bytes": grown}
    return {
        "metrics": metrics,
        "n_bytes": sum(tensor.nbytes for tensor in parts.values()),
        "digest": fingerprint(parts),
    }


main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]), Path(sys.argv[6]))
