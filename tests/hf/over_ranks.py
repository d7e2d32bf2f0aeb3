"""Ranks of a process group that load transformers' classes by their plans, with and without fastload.

    python -m tests.hf.over_ranks RANK N_RANKS FOLDER

FOLDER has the checkpoints that `write_checkpoints` makes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import fastload
from fastload import hf
from tests.distributed.groups import Findings, be_a_rank
from tests.hf.families import LLAMA, build

FAMILIES = ["llama", "qwen3_moe", "mixtral", "deepseek_v3"]
# Written here because the hf tests have no need of them.
OTHERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True)),
    "phi3": ("Phi3ForCausalLM", lambda: transformers.Phi3Config(**LLAMA, pad_token_id=0, eos_token_id=1)),
}
# Spelled in another way by the oldest version.
EP = {"ep_size": 2} if "ep_size" in DistributedConfig.__dataclass_fields__ else {"enable_expert_parallel": True}
UNEVEN = "uneven"
SAVED, STOCK = "saved", "saved by transformers"
SHARDED, SHARD_BYTES = "in shards", 60_000
TOKENS = torch.arange(12).reshape(2, 6)


def write_checkpoints(folder: Path) -> None:
    for name in FAMILIES:
        build(name).save_pretrained(folder / name)
    torch.manual_seed(0)
    for name, (class_name, config) in OTHERS.items():
        getattr(transformers, class_name)(config()).save_pretrained(folder / name)
    uneven = transformers.MixtralConfig(**{**LLAMA, "intermediate_size": 49})
    transformers.MixtralForCausalLM(uneven).save_pretrained(folder / UNEVEN)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load(path: Path | None, kind: Any = transformers.AutoModelForCausalLM, **how: Any) -> Any:
    """The model, and who placed its weights."""
    hf.reset_stats()
    torch.manual_seed(0)
    config = DistributedConfig(**how.pop("over", {"tp_size": 2}))
    model = kind.from_pretrained(path, distributed_config=config, **how)
    return model, hf.stats()


def compared(path: Path | None, kind: Any = transformers.AutoModelForCausalLM, **how: Any) -> Findings:
    """A model that transformers loads, beside the same that fastload loads."""
    stock, _ = load(path, kind, **how)
    with hf.enabled():
        model, stats = load(path, kind, **how)
    pairs, found = (one.state_dict() for one in (stock, model))
    return {
        "models": (stock, model),
        "fast loads": stats.fast_loads,
        "reasons": stats.reasons,
        "differing": [name for name, tensor in pairs.items() if not is_same(tensor, found[name])],
        "n_laid_out": sum(isinstance(tensor, DTensor) for tensor in found.values()),
        "n_bytes": fastload.report(model).n_bytes if stats.fast_loads else 0,
        "n_owned_bytes": sum(local(held).nbytes for held in model.parameters()),
        "n_whole_bytes": sum(held.numel() * held.element_size() for held in model.parameters()),
    }


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are of one kind, laid out alike, and have the same bytes here."""
    kinds = [(type(held), held.dtype, getattr(held, "placements", None), held.shape) for held in (a, b)]
    parts = [local(held).contiguous().view(torch.uint8) for held in (a, b)]
    return kinds[0] == kinds[1] and torch.equal(*parts)


def run(findings: Findings) -> Findings:
    """Findings with the answer whether the two models' outputs are the same."""
    with torch.no_grad():
        outputs = [local(model(TOKENS).logits) for model in findings.pop("models")]
    return findings | {"equal outputs": torch.equal(*outputs)}


def saved(folder: Path, label: str, name: str = "", shard_bytes: int = 10**9, **how: Any) -> Findings:
    """What became of a model that all ranks save together; transformers saves it too."""
    model, _ = load(folder / (name or label), **how)
    model.save_pretrained(folder / STOCK / label, max_shard_size=shard_bytes)
    hf.reset_stats()
    report = hf.save_pretrained(model, folder / SAVED / label, is_main_process=False, max_shard_size=shard_bytes)
    return {"fast saves": hf.stats().fast_saves, "reasons": hf.stats().reasons, "is told": report is not None}


def handed_over(folder: Path, **options: Any) -> Findings:
    """What became of a save that ranks cannot make together."""
    model, _ = load(folder / "llama")
    hf.reset_stats()
    report = hf.save_pretrained(model, folder / "handed over", **options)
    return {"fast saves": hf.stats().fast_saves, "reasons": hf.stats().reasons, "is told": report is not None}


def message(load: Callable[[], object]) -> str:
    try:
        load()
    except fastload.FastloadError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def find(folder: Path, n_ranks: int) -> Findings:
    findings = {name: run(compared(folder / name)) for name in (*FAMILIES, *OTHERS)}
    findings["converted"] = run(compared(folder / "mixtral", dtype=torch.bfloat16))
    findings["whole experts"] = run(compared(folder / "mixtral", over={"tp_size": 2, **EP}))
    findings["fully sharded"] = run(compared(folder / "mixtral", over={"fsdp_size": 2}))
    findings["new head"] = run(compared(folder / "llama", transformers.AutoModelForTokenClassification))
    # transformers cannot run it.
    findings["uneven"] = compared(folder / UNEVEN)
    del findings["uneven"]["models"]
    findings["saves"] = {
        **{name: saved(folder, name) for name in (*FAMILIES, *OTHERS)},
        "whole experts": saved(folder, "whole experts", "mixtral", over={"tp_size": 2, **EP}),
        "fully sharded": saved(folder, "fully sharded", "mixtral", over={"fsdp_size": 2}),
        SHARDED: saved(folder, SHARDED, "qwen3_moe", SHARD_BYTES),
    }
    findings["as a .bin"] = handed_over(folder, safe_serialization=False)
    given = load_file(folder / "llama" / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder / "llama")
    how = {"config": config, "state_dict": given}
    findings["given"] = run(compared(None, transformers.LlamaForCausalLM, **how))
    with hf.enabled():
        findings["refusals"] = {
            "lazy": message(lambda: load(folder / "llama", lazy=True)),
            "budget": message(lambda: load(folder / "llama", memory_budget="1GB")),
        }
    return findings


if __name__ == "__main__":
    be_a_rank(find)
