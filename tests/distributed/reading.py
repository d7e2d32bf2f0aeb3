"""Ranks of a process group that read for themselves or for each other, each a process: what each of them asked for.

    python -m tests.distributed.reading RANK FOLDER

FOLDER has the checkpoints of `test_reading.py`; the file of the rendezvous and each rank's findings are written there.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fastload
from fastload.storage import mapping
from fastload.storage.memory import private_bytes
from fastload.storage.residency import Residency
from tests.cold import make_cold, read_bytes, wait_for_no_threads
from tests.distributed.layouts import (
    EXPERTS,
    SHAPE,
    Findings,
    Holder,
    Net,
    both,
    fully_sharded,
    grid,
    line,
    local,
    message,
    same_bytes,
    tensor_parallel,
)

N_RANKS = 4
MB = 1 << 20


class Wide(nn.Module):
    """448 MB: what is cut by rows, by columns in runs of 8 kB, and what every rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4096, 2048)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            block = nn.Module()
            block.norm = nn.LayerNorm(2048)
            block.up = nn.Linear(2048, 8192, bias=False)
            block.down = nn.Linear(8192, 2048, bias=False)
            self.blocks.append(block)


@contextmanager
def as_cold(before: Callable[[int], None] = lambda descriptor: None) -> Iterator[None]:
    """Files that are small enough to be cached as soon as they are looked at, taken for cold.

    Args:
        before: called with a file's descriptor when the ranks are about to agree on who reads what.
    """
    original = mapping.residency

    def residency(descriptor: int, *, exact: bool = True) -> Residency:
        before(descriptor)
        return Residency(1, 0, True)

    mapping.residency = residency  # type: ignore[assignment]
    try:
        yield
    finally:
        mapping.residency = original


@contextmanager
def machines_of(n_ranks: int) -> Iterator[None]:
    """So many ranks on each machine, as torchrun says it."""
    os.environ["LOCAL_WORLD_SIZE"] = str(n_ranks)
    os.environ["LOCAL_RANK"] = str(dist.get_rank() % n_ranks)
    try:
        yield
    finally:
        del os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"]


class PeakMemory:
    """The most private memory that this process had, beyond what it had before."""

    def __enter__(self) -> PeakMemory:
        self.n_bytes, self._before_bytes = 0, private_bytes() or 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.002):
            self.n_bytes = max(self.n_bytes, (private_bytes() or 0) - self._before_bytes)


def together(path: Path, lay_out: Callable[[nn.Module], nn.Module], build: Any = Net, **how: Any) -> Findings:
    """A model on meta that is laid out and loaded with the reading shared, beside one that is loaded alone."""
    with torch.device("meta"):
        net, reference = lay_out(build()), lay_out(build())
    fastload.load_model(reference, path, **how)
    with as_cold():
        report = fastload.load_model(net, path, dedup="node", **how)
    pairs = dict(net.named_parameters())
    return {
        "differing": [name for name, tensor in reference.named_parameters() if not same_bytes(tensor, pairs[name])],
        "kinds": {type(pairs[name]) is type(tensor) for name, tensor in reference.named_parameters()},
        "n_read_bytes": report.n_read_bytes,
        "n_bytes": report.n_bytes,
        "actions": report.bytes_by_action,
        "note": report.notes[-1],
    }


def differing_shards(path: Path, mesh: DeviceMesh, *, on_meta: bool = True, **how: Any) -> list[str]:
    """Layouts of one tensor that differ if the ranks read for each other."""
    ways = [Replicate(), *map(Shard, range(len(SHAPE)))]
    wrong = []
    for placements in [(way,) for way in ways] if mesh.ndim == 1 else [(a, b) for a in ways for b in ways]:
        holders = []
        for options in ({}, {"dedup": "node"}):
            whole = torch.empty(SHAPE, device="meta" if on_meta else "cpu")
            holders.append(Holder(distribute_tensor(whole, mesh, placements)))
            with as_cold():
                fastload.load_model(holders[-1], path, **options, **how)
        if not same_bytes(holders[0].experts.weight, holders[1].experts.weight):
            wrong.append(str(placements))
    return wrong


def cold(path: Path, lay_out: Callable[[nn.Module], nn.Module], *, alone: bool = False, **how: Any) -> Findings:
    """Bytes and memory of a load of a large checkpoint that is not in memory; alone for the first rank only."""
    with torch.device("meta"):
        net = lay_out(Wide())
    wait_for_no_threads()
    gc.collect()
    dist.barrier()  # nobody has a page of it mapped any more
    if dist.get_rank() == 0:
        make_cold(path / "model.safetensors")
    dist.barrier()
    if alone and dist.get_rank() != 0:
        dist.barrier()
        return {}
    before_bytes = read_bytes()
    # Where machines are one in truth, a rank may find in its memory what the other machine has read.
    with PeakMemory() as peak, as_cold() if how else nullcontext():
        report = fastload.load_model(net, path, **how)
    wait_for_no_threads()
    fetched_bytes = read_bytes() - before_bytes
    dist.barrier()
    whole = fastload.open_checkpoint(path)
    return {
        "n_read_bytes": report.n_read_bytes,
        "fetched_bytes": fetched_bytes,
        "n_owned_bytes": sum(local(tensor).nbytes for tensor in net.parameters()),
        "n_whole_bytes": sum(tensor.numel() * tensor.itemsize for tensor in net.parameters()),
        "actions": report.bytes_by_action,
        "peak_bytes": peak.n_bytes,
        "wrong": [name for name, tensor in net.named_parameters() if not same_bytes(tensor, part(whole[name], tensor))],
        "notes": report.notes,
        "stages": report.stages_ms,
        "report": str(fastload.report(net)),
    }


def part(whole: torch.Tensor, tensor: Any) -> torch.Tensor:
    """What this rank should have of a tensor that is laid out as another; there is no message in it."""
    for number, placement in enumerate(getattr(tensor, "placements", ())):
        if isinstance(placement, Shard):
            chunks = whole.chunk(tensor.device_mesh.size(number), placement.dim)
            whole = chunks[tensor.device_mesh.get_coordinate()[number]]
    return whole


def failing(folder: Path, mesh: DeviceMesh) -> Findings:
    """What each rank says when one of them cannot load."""
    rank = dist.get_rank()
    checkpoint = folder / "checkpoint"
    return {
        "missing": message(lambda: shared_load(folder / ("gone" if rank == 3 else "checkpoint"), mesh)),
        "other": message(lambda: shared_load(folder / ("shards" if rank == 0 else "checkpoint"), mesh)),
        "cut": message(lambda: shared_load(folder / ("cut" if rank == 0 else "checkpoint"), mesh, cut)),
        "after": shared_load(checkpoint, mesh),
    }


def cut(descriptor: int) -> None:
    """What cuts this rank's file between its opening and its reading."""
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    if Path(path).parent.name == "cut":
        os.truncate(path, os.path.getsize(path) // 2)


def killed(descriptor: int) -> None:
    """What ends one rank in the midst of a load."""
    if dist.get_rank() == 3:
        os._exit(0)


def shared_load(path: Path, mesh: DeviceMesh, before: Callable[[int], None] = lambda descriptor: None) -> list[str]:
    with torch.device("meta"):
        net = tensor_parallel(Net(), mesh)
    with as_cold(before):
        return list(fastload.load_model(net, path, dedup="node").bytes_by_action)


def native(path: Path) -> Findings:
    """A native model, split over the ranks: read for each other and each for itself."""
    alone = fastload.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    with as_cold():
        model = fastload.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dedup="node")
    parts = dict(model.named_parameters())
    report = fastload.report(model)
    return {
        "differing": [name for name, tensor in alone.named_parameters() if not same_bytes(tensor, parts[name])],
        "actions": report.bytes_by_action,
        "n_read_bytes": report.n_read_bytes,
        "n_whole_bytes": fastload.open_checkpoint(path).n_bytes,
    }


def find(folder: Path) -> Findings:
    mesh = line(N_RANKS)
    checkpoint = folder / "checkpoint"
    findings: Findings = {}
    for n_local in (2, 4):
        with machines_of(n_local):
            findings[f"tensor parallel on {n_local}"] = together(checkpoint, lambda net: tensor_parallel(net, mesh))
            findings[f"converted on {n_local}"] = together(
                checkpoint, lambda net: tensor_parallel(net, mesh), dtype=torch.bfloat16
            )
            findings[f"both on {n_local}"] = together(checkpoint, lambda net: both(net, grid(4, "dp", "tp")))
            findings[f"copies on {n_local}"] = together(checkpoint, lambda net: net)
    with machines_of(2):
        findings["shards"] = differing_shards(folder / "one", grid(4, "a", "b"), on_meta=False)
        findings["shards of experts"] = differing_shards(folder / "experts", mesh, fusions=[EXPERTS])
    findings["by host name"] = together(checkpoint, lambda net: fully_sharded(net, mesh))
    with machines_of(4):
        findings["native"] = native(folder / "native")
        findings["failing"] = failing(folder, mesh)
    wide = folder / "wide"
    findings["cold tensor parallel"] = cold(wide, lambda net: tensor_parallel(net, mesh))
    findings["cold, alone"] = cold(wide, lambda net: tensor_parallel(net, mesh), alone=True)
    findings["cold fully sharded"] = cold(wide, lambda net: fully_sharded(net, mesh))
    with machines_of(4):
        findings["cold tensor parallel, shared"] = cold(wide, lambda net: tensor_parallel(net, mesh), dedup="node")
        findings["cold fully sharded, shared"] = cold(wide, lambda net: fully_sharded(net, mesh), dedup="node")
    with machines_of(2):
        findings["cold, two machines"] = cold(wide, lambda net: tensor_parallel(net, mesh), dedup="node")
    return findings


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=N_RANKS,
        timeout=timedelta(seconds=60),
    )
    findings = find(folder)
    torch.save(findings, folder / f"findings-{rank}.pt")
    dist.barrier()
    with machines_of(4):
        findings["killed"] = message(lambda: shared_load(folder / "checkpoint", line(N_RANKS), killed))
    torch.save(findings, folder / f"findings-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
