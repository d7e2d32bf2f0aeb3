"""One save in a fresh process: ``save.py LIBRARY SYNC FOLDER OUT``, SYNC being ``sync`` or ``lazy``.

The model is in memory of its own before the clock starts. Peers write the same shards; where they are to be as durable
as fastload's files, each is synced, and the folder last.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from suite.fingerprint import fingerprint
from suite.fresh import finish
from suite.memory import PrivatePeak, private_bytes

if TYPE_CHECKING:
    import torch

_SHARD_BYTES = 10**9


def main(library: str, sync: bool, folder: Path, out: Path) -> None:
    """Save once, then see that what was written is what was given."""
    from safetensors.torch import load_file

    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    save = {"fastload": _fastload, "safetensors": _safetensors}[library]
    save({"warm": next(iter(tensors.values()))[:1].clone()}, out, sync)
    shutil.rmtree(out)
    os.sync()  # what others have left to write shall not be waited for here
    before = private_bytes()
    try:
        with PrivatePeak(interval_s=0.005) as watch:
            begun = perf_counter()
            save(tensors, out, sync)
            seconds = perf_counter() - begun
        found: dict[str, torch.Tensor] = {}
        for path in out.glob("*.safetensors"):
            found |= load_file(path)
        if fingerprint(found) != fingerprint(tensors):
            raise AssertionError(f"{library} wrote something else")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    finish(metrics={"seconds": seconds, "peak_growth_bytes": watch.peak_bytes - before})


def _fastload(tensors: dict[str, torch.Tensor], out: Path, sync: bool) -> None:
    import fastload

    fastload.save_state_dict(tensors, out, max_shard_size=_SHARD_BYTES, durability="full" if sync else "none")


def _safetensors(tensors: dict[str, torch.Tensor], out: Path, sync: bool) -> None:
    from safetensors.torch import save_file

    out.mkdir(exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if size + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    for number, shard in enumerate(shards, 1):
        path = out / f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        if sync:
            _sync(path)
    if sync:
        _sync(out)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


main(sys.argv[1], sys.argv[2] == "sync", Path(sys.argv[3]), Path(sys.argv[4]))
