"""Ranks of a process group that save through torch.distributed.checkpoint and load with fastload, each a process.

    python -m tests.distributed.dcp_ranks RANK N_RANKS FOLDER

FOLDER has the checkpoints of `test_dcp_on_ranks.py`; what the ranks save and what they found is written there.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import fastload
from tests.distributed.groups import Findings, be_a_rank
from tests.distributed.layouts import Net, both, fully_sharded, grid, line, local, tensor_parallel

#: Which ranks of four wrote each folder, and how the model lay on them.
FOLDERS = ("parallel", "sharded", "both", "pair", "trained", "small")


def net(dtype: torch.dtype = torch.float32, width: int = 42) -> nn.Module:
    torch.manual_seed(0)
    return Net(width=width).to(dtype)


def save_all(folder: Path, pair: DeviceMesh) -> None:
    """What ranks write: two-dimensional and uneven layouts, one with an optimizer, one by two ranks of the four."""
    mesh = line(dist.get_world_size())
    dcp.save(tensor_parallel(net(width=40), mesh).state_dict(), checkpoint_id=folder / "parallel")
    dcp.save(fully_sharded(net(), mesh).state_dict(), checkpoint_id=folder / "sharded")
    dcp.save({"model": both(net(), grid(4, "dp", "tp")).state_dict()}, checkpoint_id=folder / "both")
    dcp.save(fully_sharded(net(torch.bfloat16), mesh).state_dict(), checkpoint_id=folder / "small")
    if pair.get_coordinate() is not None:
        dcp.save(fully_sharded(net(), pair).state_dict(), checkpoint_id=folder / "pair", process_group=pair.get_group())
    trained = fully_sharded(net(), mesh)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.0)
    trained(torch.arange(19).reshape(1, -1)).sum().backward()
    optimizer.step()
    weights, of_optimizer = get_state_dict(trained, optimizer)
    dcp.save({"app": {"model": weights, "optim": of_optimizer, "step": 7}}, checkpoint_id=folder / "trained")


def differing(loaded: nn.Module, expected: nn.Module) -> list[str]:
    """Names whose local parts differ, in a byte or in how they are laid out."""
    pairs = expected.state_dict()
    return [
        name
        for name, tensor in loaded.state_dict().items()
        if not torch.equal(local(tensor).view(torch.uint8), local(pairs[name]).view(torch.uint8))
        or (isinstance(tensor, DTensor) and tensor.placements != pairs[name].placements)
    ]


def load_all(folder: Path) -> Findings:
    """Folders that other numbers of ranks wrote, in other layouts, into models on meta and in memory."""
    mesh = line(dist.get_world_size())
    ways = {
        "parallel": lambda model: tensor_parallel(model, mesh),
        "sharded": lambda model: fully_sharded(model, mesh),
        "both": lambda model: both(model, grid(4, "dp", "tp")),
    }
    findings: Findings = {}
    for name in FOLDERS:
        width, dtype = 40 if name == "parallel" else 42, torch.bfloat16 if name == "small" else torch.float32
        for way, lay_out in ways.items():
            if way == "parallel" and width == 42 and mesh.size() == 4:
                continue  # 42 features are no multiple of four ranks, which parallelize_module asks for
            expected = lay_out(net(dtype, width))
            with torch.device("meta"):
                on_meta = Net(width=width).to(dtype)
            on_meta = lay_out(on_meta)
            in_memory = lay_out(net(dtype, width))
            with torch.no_grad():
                for parameter in in_memory.parameters():
                    local(parameter).fill_(-1)
            report = fastload.load_model(on_meta, folder / name)
            fastload.load_model(in_memory, folder / name)
            findings[name, way] = {
                "differing": differing(on_meta, expected),
                "differing in memory": differing(in_memory, expected),
                "n_bytes": report.n_bytes,
                "n_owned_bytes": sum(local(parameter).nbytes for parameter in on_meta.parameters()),
            }
    return findings


def load_with_dcp(folder: Path, mesh: DeviceMesh) -> list[str]:
    """What differs of a converted folder that DCP itself reads into a sharded model."""
    model = fully_sharded(net(), mesh)
    expected = {name: local(tensor).clone() for name, tensor in model.state_dict().items()}
    state = model.state_dict()
    for tensor in state.values():
        local(tensor).fill_(-1)
    dcp.load(state, checkpoint_id=folder, process_group=mesh.get_group())
    return [name for name, tensor in state.items() if not torch.equal(local(tensor), expected[name])]


def find(folder: Path, n_ranks: int) -> Findings:
    pair = DeviceMesh("cpu", [0, 1])
    save_all(folder, pair)
    dist.barrier()
    findings = load_all(folder)
    findings["by dcp on four"] = load_with_dcp(folder / "converted", line(4))
    if pair.get_coordinate() is not None:
        findings["by dcp on two"] = load_with_dcp(folder / "converted", pair)
    return findings


if __name__ == "__main__":
    be_a_rank(find)
