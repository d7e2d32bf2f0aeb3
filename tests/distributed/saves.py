"""Ranks of a process group that save models laid out over them, each a process.

    python -m tests.distributed.saves RANK N_RANKS FOLDER

Beside what all ranks saved, rank 0 saves the whole tensors by itself, for the test to compare.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import fastload
from fastload.saver import save_checkpoint
from fastload.storage.memory import private_bytes
from tests.conftest import same_bytes
from tests.distributed.groups import Findings, be_a_rank
from tests.distributed.layouts import Net, both, fully_sharded, grid, line, local, tensor_parallel
from tests.staging.devices import CountingDevice

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool]
LARGE = (2 * 4096 + 3, 1031)  # three blocks of checksums, in float32


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tensors, gathered; those that are the same memory stay so."""
    made: dict[int, torch.Tensor] = {}
    return {
        key: made.setdefault(local(tensor).data_ptr() or id(tensor), gathered(tensor))
        for key, tensor in tensors.items()
    }


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def saved_both_ways(
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    name: str,
    full: Mapping[str, torch.Tensor] | None = None,
    **how: Any,
) -> Findings:
    """Save by all ranks, then by one."""
    n_told = 0

    def tell(n_bytes: int) -> None:
        nonlocal n_told
        n_told += n_bytes

    report = fastload.save_state_dict(tensors, folder / "together" / name, progress=tell, **how)
    full = whole(tensors) if full is None else full
    if dist.get_rank() == 0:
        fastload.save_state_dict(full, folder / "alone" / name, **how)
    dist.barrier()
    return {
        "report": asdict(report),
        "n_told": n_told,
        "n_here": sum(local(tensor).nbytes for tensor in tensors.values()),
    }


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (n_bytes,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def laid_out(value: torch.Tensor, mesh: DeviceMesh, way: Placement) -> torch.Tensor:
    """distribute_tensor, of types too that gloo does not know."""
    plain = {1: torch.uint8, 2: torch.float16, 4: torch.float32, 8: torch.int64}[value.itemsize]
    part = distribute_tensor(value.view(plain), mesh, [way]).to_local().view(value.dtype)
    return DTensor.from_local(part, mesh, [way], shape=value.shape, stride=value.stride())


def of_all_types(mesh: DeviceMesh) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Each type in each layout, among them parts that are uneven and empty, scalars, and plain tensors.

    The same tensors laid out, and whole.
    """
    ways = (Replicate(), Shard(0), Shard(1), Shard(2))
    laid: dict[str, torch.Tensor] = {"plain": torch.arange(7), "none": torch.empty(0, 3), "step": torch.tensor(3.0)}
    full = dict(laid)
    for number, (dtype, way) in enumerate(product(DTYPES, ways)):
        full[f"{number}"] = random_bits((5, 6, 7), dtype)
        laid[f"{number}"] = laid_out(full[f"{number}"], mesh, way)
    others = {"short": torch.randn(1, 9), "empty": torch.empty(0, 4), "turned": torch.randn(6, 10)}
    full |= others | {"scalar": torch.tensor(2.5)}
    laid |= {key: laid_out(value, mesh, Shard(0)) for key, value in others.items()}
    laid["scalar"] = laid_out(full["scalar"], mesh, Replicate())
    turned = laid["turned"].to_local().t().contiguous().t()
    laid["turned"] = DTensor.from_local(turned, mesh, [Shard(0)], shape=(6, 10), stride=(10, 1))
    # A tensor of which every rank has another: the first rank's is the one.
    full["different"] = laid["different"] = torch.full((4,), float(dist.get_rank()))
    return laid, full


def large(mesh: DeviceMesh) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A tensor of several blocks of checksums in each layout, and whole."""
    value = torch.randn(LARGE)
    ways = (Replicate(), Shard(0), Shard(1))
    return {str(way): distribute_tensor(value, mesh, [way]) for way in ways}, {str(way): value.clone() for way in ways}


def turned(mesh: DeviceMesh, folder: Path) -> Findings:
    """A part of 64 MiB whose rows do not follow each other in memory: what saving it takes, in private memory."""
    full = torch.randn(4096, 8192)
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    part = full.chunk(n_ranks, dim=1)[rank].t().contiguous().t()
    tensors = {"turned": DTensor.from_local(part, mesh, [Shard(1)], shape=full.shape, stride=full.stride())}
    peak = 0

    def look(_: int) -> None:
        nonlocal peak
        peak = max(peak, private_bytes() or 0)

    gc.collect()  # what earlier groups of tensors left may go at any moment, and would be taken for less use
    before = private_bytes() or 0
    fastload.save_state_dict(tensors, folder / "together" / "turned", progress=look, durability="none")
    if rank == 0:
        fastload.save_state_dict({"turned": full}, folder / "alone" / "turned", durability="none")
    dist.barrier()
    return {"n_looked_at": peak, "n_more": peak - before, "n_here": part.nbytes}


def packed(mesh: DeviceMesh, folder: Path) -> Findings:
    """Parameters that are several tensors, of each of which a rank has a part, beside ordinary ones."""
    rank, n_ranks = mesh.get_local_rank(), mesh.size()
    full = {"gate_up": torch.randn(24, 5), "columns": torch.randn(3, 4, 24)}
    laid = {}
    for key, dim, n_groups in (("gate_up", 0, 2), ("columns", 2, 3)):
        value = full[key]
        part = torch.cat([group.chunk(n_ranks, dim)[rank] for group in value.chunk(n_groups, dim)], dim)
        way = _StridedShard(dim, split_factor=n_groups)
        laid[key] = DTensor.from_local(part, mesh, [way], run_check=False, shape=value.shape, stride=value.stride())
    return saved_both_ways(laid, folder, "packed", full)


def from_a_device(mesh: DeviceMesh, folder: Path) -> Findings:
    """Parts that are copied out through pinned memory, of a device that is memory in truth."""
    laid, full = (small | big for small, big in zip(of_all_types(mesh), large(mesh), strict=True))
    device = CountingDevice()
    save_checkpoint(laid, folder / "together" / "from a device", durability="none", devices=lambda name: device)
    if dist.get_rank() == 0:
        save_checkpoint(full, folder / "alone" / "from a device", durability="none")
    dist.barrier()
    return {"n_pins": device.n_pins}


def net(n_ranks: int, kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "tensor parallel":
        return tensor_parallel(Net(), line(n_ranks))
    if kind == "tied":
        return fully_sharded(Net(is_tied=True), line(n_ranks))
    if kind == "both":
        return both(Net(width=42), grid(n_ranks, "dp", "tp"))
    if kind == "hybrid":
        return fully_sharded(Net(), grid(n_ranks, "copies", "parts"))
    if kind == "inner mesh":  # which has no rank of the other half
        return tensor_parallel(Net(), grid(n_ranks, "dp", "tp")["tp"])
    return fully_sharded(Net(), line(n_ranks))


def experts(mesh: DeviceMesh, way: Placement) -> tuple[fastload.Qwen3MoeForCausalLM, fastload.Qwen3MoeForCausalLM]:
    """A model with tied embeddings and fused experts whose parameters are laid out along a dimension, and as it was."""
    torch.manual_seed(3)
    config = fastload.Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=2, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=6, tie_word_embeddings=True,
    )  # fmt: skip
    model = fastload.Qwen3MoeForCausalLM(config)
    plain = copy.deepcopy(model)
    for name, tensor in [*model.named_parameters()]:
        at = way if tensor.ndim > way.dim else Replicate()
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(distribute_tensor(tensor.detach(), mesh, [at])))
    model.lm_head.weight = model.model.embed_tokens.weight
    return model, plain


def saved_models(folder: Path, mesh: DeviceMesh) -> Findings:
    """Models saved as a user does, by all ranks and by one, over an older checkpoint of another form."""
    found = {}
    for dim in range(3):
        model, plain = experts(mesh, Shard(dim))
        name = f"experts by dimension {dim}"
        together = folder / "together" / name
        for size in (5000, "1MB"):
            report = model.save_pretrained(together, max_shard_size=size, is_main_process=dist.get_rank() == 0)
        if dist.get_rank() == 0:
            plain.save_pretrained(folder / "alone" / name)
        found[name] = {"report": asdict(report)}
    net_of = fully_sharded(Net(), mesh)
    found["a module"] = {"report": asdict(fastload.save_model(net_of, folder / "together" / "a module", variant="v"))}
    full = whole(net_of.state_dict())
    if dist.get_rank() == 0:
        fastload.save_state_dict(full, folder / "alone" / "a module", variant="v")
    dist.barrier()
    return found


def differing(path: Path, lay_out: Callable[[nn.Module], nn.Module]) -> list[str]:
    """Names of what a model laid out over these ranks loads otherwise than the files of other ranks have it."""
    with torch.device("meta"):
        module = lay_out(Net())
    fastload.load_model(module, path)
    expected = fastload.load_state_dict(path)
    return [name for name, tensor in module.named_parameters() if not same_bytes(gathered(tensor), expected[name])]


def find(folder: Path, n_ranks: int) -> Findings:
    kinds = ["tensor parallel", "fully sharded", "tied"] + ["both", "hybrid", "inner mesh"] * (n_ranks == 4)
    findings: Findings = {}
    for kind in kinds:
        findings[kind] = saved_both_ways(net(n_ranks, kind).state_dict(), folder, kind)
    findings["in shards"] = saved_both_ways(
        net(n_ranks, "tied").state_dict(), folder, "in shards", max_shard_size=4000, metadata={"a": "b"}, variant="x"
    )
    torch.manual_seed(2)
    tensors, full = of_all_types(line(n_ranks))
    findings["types"] = saved_both_ways(tensors, folder, "types", full, durability="none")
    findings["types in shards"] = saved_both_ways(tensors, folder, "types in shards", full, max_shard_size=1500)
    findings["large"] = saved_both_ways(large(line(n_ranks))[0], folder, "large", durability="data")
    findings["from a device"] = from_a_device(line(n_ranks), folder)
    findings["packed"] = packed(line(n_ranks), folder)
    if n_ranks == 2:
        findings["turned"] = turned(line(n_ranks), folder)
        of_four, mesh = folder / "of four", line(n_ranks)
        findings["of four, tensor parallel"] = differing(
            of_four / "fully sharded", lambda net: tensor_parallel(net, mesh)
        )
        findings["of four, fully sharded"] = differing(
            of_four / "tensor parallel", lambda net: fully_sharded(net, mesh)
        )
    findings |= saved_models(folder, line(n_ranks))
    return findings


if __name__ == "__main__":
    be_a_rank(find)
