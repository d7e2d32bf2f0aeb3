"""Ranks of a process group that load models laid out over them, each a process: what every one of them found.

    python -m tests.distributed.layouts RANK N_RANKS FOLDER

FOLDER has the checkpoints of `test_ranks.py`; the file of the rendezvous and each rank's findings are written there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastload
from fastload.plan.fusing import Concatenate, Fusion, Stack
from tests.distributed.groups import Findings, be_a_rank

N_TOKENS = 19  # uneven over 2 and over 4 ranks
SHAPE = (3, 10, 5)
EXPERTS = Fusion(("experts.*.gate", "experts.*.up"), "experts.weight", (Stack(0), Concatenate(1)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up = nn.Linear(24, width)
        self.down = nn.Linear(width, 24)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.up(self.norm(hidden))))


class Net(nn.Module):
    def __init__(self, is_tied: bool = False, width: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(N_TOKENS, 24)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(24, N_TOKENS, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def tensor_parallel(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    return parallelize_module(net, mesh, plan)


def fully_sharded(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def both(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_sharded(tensor_parallel(net, mesh["tp"]), mesh["dp"])


def grid(n_ranks: int, *names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, n_ranks // 2), mesh_dim_names=names)


def line(n_ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (n_ranks,))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = local(a.detach()), local(b.detach())
    equal = torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    return a.shape == b.shape and a.dtype == b.dtype and equal


def filled(
    path: Path,
    lay_out: Callable[[nn.Module], nn.Module],
    build: Callable[[], nn.Module] = Net,
    **how: Any,
) -> Findings:
    """A model on meta that is laid out and loaded, beside one that was loaded whole and then laid out."""
    whole = build()
    fastload.load_model(whole, path)
    tokens = torch.arange(N_TOKENS).reshape(1, -1)
    with torch.no_grad():
        expected = whole(tokens)
    whole.to(how.get("dtype"))
    reference = lay_out(whole)
    with torch.device("meta"):
        net = build()
    net = lay_out(net)
    report = fastload.load_model(net, path, **how)
    pairs = dict(net.named_parameters())
    differing = [
        name
        for name, tensor in reference.named_parameters()
        if not same_bytes(tensor, pairs[name]) or type(tensor) is not type(pairs[name]) or pairs[name].is_meta
    ]
    laid_out = [(tensor, pairs[name]) for name, tensor in reference.named_parameters() if isinstance(tensor, DTensor)]
    with torch.no_grad():
        output = net(tokens) if not how else expected
    return {
        "differing": differing,
        "layouts_differ": any(
            (a.placements, a.device_mesh, a.shape, a.stride()) != (b.placements, b.device_mesh, b.shape, b.stride())
            for a, b in laid_out
        ),
        "n_laid_out": len(laid_out),
        "error": (local(output) - expected).abs().max().item(),
        "n_bytes": report.n_bytes,
        "n_owned_bytes": sum(local(tensor).nbytes for tensor in pairs.values()),
        "n_whole_bytes": sum(tensor.numel() * tensor.element_size() for tensor in pairs.values()),
        "actions": report.bytes_by_action,
        "is_tied": net.head.weight is net.embed.weight,
        "is_recorded": fastload.report(net) is report,
    }


class Holder(nn.Module):
    """One parameter, "experts.weight", as a layout made it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(weight)


def differing_shards(path: Path, mesh: DeviceMesh, *, on_meta: bool = True, fusions: list[Fusion] = []) -> list[str]:  # noqa: B006
    """Layouts of one tensor for which what was loaded is not what distribute_tensor makes of the whole."""
    holder = Holder(torch.zeros(SHAPE))
    fastload.load_model(holder, path, fusions=fusions)
    whole = holder.experts.weight.detach().contiguous()
    ways = [Replicate(), *map(Shard, range(whole.ndim)), Shard(-1)]
    layouts = [(way,) for way in ways] if mesh.ndim == 1 else [(a, b) for a in ways for b in ways]
    wrong = []
    for placements in layouts:
        expected = distribute_tensor(whole, mesh, placements)
        start = torch.empty_like(whole, device="meta") if on_meta else torch.zeros_like(whole)
        holder = Holder(distribute_tensor(start, mesh, placements))
        report = fastload.load_model(holder, path, fusions=fusions)
        if not same_bytes(expected, holder.experts.weight) or report.n_bytes != local(expected).nbytes:
            wrong.append(str(placements))
    return wrong


def message(load: Callable[[], object]) -> str:
    try:
        load()
    except fastload.FastloadError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refusals(folder: Path, mesh: DeviceMesh) -> Findings:
    with torch.device("meta"):
        net = tensor_parallel(Net(), mesh)
        short = Net()
        short.blocks[0].up = nn.Linear(24, 44)
    short = tensor_parallel(short, mesh)
    return {
        "shape": message(lambda: fastload.load_model(short, folder / "checkpoint")),
        "lazy": message(lambda: fastload.load_model(net, folder / "checkpoint", lazy=True)),
        "ties": message(lambda: fastload.load_model(tied_on_meta(mesh), folder / "checkpoint")),
        "missing": message(lambda: fastload.load_model(net, folder / "one", strict=False)),
        "is_untouched": all(parameter.is_meta for parameter in (*net.parameters(), *short.parameters())),
    }


def tied_on_meta(mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        return fully_sharded(Net(is_tied=True), mesh)


def find(folder: Path, n_ranks: int) -> Findings:
    mesh = line(n_ranks)
    checkpoint = folder / "checkpoint"
    findings = {
        "tensor parallel": filled(checkpoint, lambda net: tensor_parallel(net, mesh)),
        "fully sharded": filled(checkpoint, lambda net: fully_sharded(net, mesh)),
        "converted": filled(checkpoint, lambda net: tensor_parallel(net, mesh), dtype=torch.bfloat16),
        "detached": filled(checkpoint, lambda net: tensor_parallel(net, mesh), detached=True),
        "tied": filled(folder / "tied", lambda net: fully_sharded(net, mesh), lambda: Net(is_tied=True)),
        "wrong shards": differing_shards(folder / "one", mesh),
        "wrong shards in memory": differing_shards(folder / "one", mesh, on_meta=False),
        "wrong shards of a view": differing_shards(folder / "view", mesh),
        "wrong shards of experts": differing_shards(folder / "experts", mesh, fusions=[EXPERTS]),
        "wrong shards of experts in memory": differing_shards(
            folder / "experts", mesh, fusions=[EXPERTS], on_meta=False
        ),
        "refusals": refusals(folder, mesh),
    }
    if n_ranks == 4:
        findings["both"] = filled(checkpoint, lambda net: both(net, grid(4, "dp", "tp")))
        findings["both, uneven"] = filled(
            folder / "odd", lambda net: both(net, grid(4, "dp", "tp")), lambda: Net(width=42)
        )
        findings["hybrid"] = filled(checkpoint, lambda net: fully_sharded(net, grid(4, "copies", "parts")))
        findings["wrong shards of a grid"] = differing_shards(folder / "one", grid(4, "a", "b"))
    return findings


if __name__ == "__main__":
    be_a_rank(find)
