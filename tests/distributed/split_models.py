"""Ranks of a process group that load native models by tensor parallel plans: what every one of them found.

    python -m tests.distributed.split_models RANK N_RANKS FOLDER

FOLDER has the checkpoints that `write_checkpoints` makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import fastload
from fastload.models import registry
from fastload.models.cache import KVCache
from fastload.plan.boxes import box_of
from fastload.plan.tensor_parallel import splits_of
from tests.distributed.groups import Findings, be_a_rank

SIZES = {
    "vocab_size": 67,  # uneven over 2 and over 4 ranks
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_local_experts": 5,  # uneven too
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
CAUSAL = "AutoModelForCausalLM"
# Name of a checkpoint -> its family, its class, and what differs from the family's config and the sizes.
CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", CAUSAL, {}),
    "llama with biases": ("llama", CAUSAL, {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", CAUSAL, {"tie_word_embeddings": True}),
    "mistral": ("mistral", CAUSAL, {"sliding_window": 4}),
    "qwen2": ("qwen2", CAUSAL, {}),
    "qwen3": ("qwen3", CAUSAL, {}),
    "gemma": ("gemma", CAUSAL, {}),
    "gemma2": ("gemma2", CAUSAL, {"sliding_window": 4}),
    "gemma3_text": ("gemma3_text", CAUSAL, {"sliding_window": 4}),
    "mixtral": ("mixtral", CAUSAL, {}),
    "qwen3_moe": ("qwen3_moe", CAUSAL, {"mlp_only_layers": [0]}),
    "few experts": ("mixtral", CAUSAL, {"num_local_experts": 3}),
    "classifier": ("qwen3", "AutoModelForSequenceClassification", {"num_labels": 3}),
    "bert": ("bert", "AutoModelForMaskedLM", {}),
}
UNEVEN = "uneven"
# Four ranks of as many processes as this machine has to share: what depends on their number.
OF_FOUR_RANKS = ["llama", "llama tied", "few experts"]
FEED_FORWARD_ALONE = {
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": "replicate",
}
PROMPT = torch.tensor([[0, 0, 7, 8, 9, 10], [11, 12, 13, 14, 15, 66]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def built(family: str, task: str, fields: dict[str, Any]) -> Any:
    config_class = registry.config_class_for(family)
    sizes = {name: value for name, value in SIZES.items() if config_class().has_field(name)}
    return registry.class_for(task, family, file=None)(config_class(**{**sizes, **fields}))


def write_checkpoints(folder: Path) -> None:
    torch.manual_seed(0)
    for name, (family, task, fields) in CHECKPOINTS.items():
        built(family, task, fields).save_pretrained(folder / name)
    built("llama", CAUSAL, {"num_attention_heads": 6, "num_key_value_heads": 3}).save_pretrained(folder / UNEVEN)


def load(folder: Path, name: str, **how: Any) -> Any:
    task = CHECKPOINTS[name][1] if name in CHECKPOINTS else CAUSAL
    return getattr(fastload, task).from_pretrained(folder / name, **how)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def differing_parts(model: Any, whole: Any, n_parts: int, part: int) -> list[str]:
    """Names of parameters of which a rank has not the bytes that the plan gives it of the whole."""
    wrong = []
    pairs = dict(whole.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        box = box_of(parameter.shape, splits_of(model.tp_plan, name, tuple(parameter.shape), n_parts, part))
        expected = pairs[name].detach()
        for dim, (begin, size) in enumerate(zip(*box, strict=True)):
            expected = expected.narrow(dim, begin, size)
        found = local(parameter.detach())
        is_same = found.shape == expected.shape and found.dtype == expected.dtype
        if not is_same or not torch.equal(*(held.contiguous().view(torch.uint8) for held in (found, expected))):
            wrong.append(name)
    return wrong


def differing_gradients(model: Any, whole: Any) -> list[str]:
    wrong = []
    pairs = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        if not torch.allclose(gradient, pairs[name].grad, rtol=1e-4, atol=1e-4):
            wrong.append(name)
    return wrong


def compared(folder: Path, name: str, n_ranks: int, rank: int) -> Findings:
    """A model that is split as its own plan says, beside the same in one process."""
    whole, model = load(folder, name), load(folder, name, tp_plan="auto")
    with torch.no_grad():
        expected, found = (held(PROMPT, attention_mask=MASK).logits for held in (whole, model))
    n_bytes = sum(local(held).nbytes for held in model.parameters())
    findings = {
        "error": (expected - found).abs().max().item(),
        "differing": differing_parts(model, whole, n_ranks, rank),
        "n_laid_out": sum(isinstance(held, DTensor) for held in model.parameters()),
        "n_bytes": fastload.report(model).n_bytes,
        "n_owned_bytes": n_bytes,
        "n_whole_bytes": sum(held.nbytes for held in whole.parameters()),
        "tp_size": model.tp_size,
    }
    if CHECKPOINTS[name][1] != CAUSAL:
        return findings
    expected_tokens, found_tokens = (
        held.generate(PROMPT, attention_mask=MASK, max_new_tokens=3) for held in (whole, model)
    )
    for held in (whole, model):
        held(PROMPT, attention_mask=MASK, labels=PROMPT).loss.backward()
    return findings | {
        "generates the same": torch.equal(expected_tokens, found_tokens),
        "differing gradients": differing_gradients(model, whole),
        "is tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }


def message(load: Callable[[], object]) -> str:
    try:
        load()
    except (fastload.FastloadError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refusals(folder: Path, n_ranks: int) -> dict[str, str]:
    attention = "model.layers.*.self_attn"
    plans: dict[str, Any] = {
        "style": {"model.layers.*.mlp.up_proj": "diagonal"},
        "pattern": {"layers.*.mlp.up_proj": "colwise"},
        "kind": {"model.norm": "colwise"},
        "no experts": {"model.layers.*.mlp": "experts"},
        "some of an attention": {f"{attention}.q_proj": "colwise", f"{attention}.o_proj": "rowwise"},
        "no plan": {},
        "no mapping": "whole",
    }
    found = {name: message(lambda plan=plan: load(folder, "llama", tp_plan=plan)) for name, plan in plans.items()}
    halves = {"model.embed_tokens": "embedding_rowwise"}
    grid = init_device_mesh("cpu", (1, n_ranks), mesh_dim_names=("a", "b"))
    model = load(folder, "llama", tp_plan="auto")
    return found | {
        "ties": message(lambda: load(folder, "llama tied", tp_plan=halves)),
        "heads": message(lambda: load(folder, UNEVEN, tp_plan="auto")),
        "inputs": message(
            lambda: load(folder, "llama", tp_plan="auto", intermediate_size=47, ignore_mismatched_sizes=True)
        ),
        "mesh": message(lambda: load(folder, "llama", device_mesh=grid)),
        "no mesh": message(lambda: load(folder, "llama", device_mesh="cpu")),
        "time": message(lambda: model.generate(PROMPT, max_time=1.0)),
        "vocabulary": message(lambda: model.resize_token_embeddings(80)),
        "cache": message(lambda: model(PROMPT, past_key_values=KVCache(model.config, 2, 9))),
    }


def sampled(model: Any, whole: Any, rank: int) -> Findings:
    """Tokens that were drawn, with ranks whose own generators differ."""
    torch.manual_seed(rank)
    how = {"do_sample": True, "max_new_tokens": 4}
    return {
        "first": model.generate(PROMPT, **how),
        "second": model.generate(PROMPT, **how),
        "seeded": model.generate(PROMPT, seed=3, **how),
        "seeded in one process": whole.generate(PROMPT, seed=3, **how),
    }


def in_use(folder: Path, n_ranks: int, rank: int) -> Findings:
    mesh = init_device_mesh("cpu", (n_ranks,))
    model, whole = load(folder, "llama", device_mesh=mesh), load(folder, "llama")
    half = load(folder, "llama", tp_plan="auto", dtype=torch.bfloat16)
    own = load(folder, UNEVEN, tp_plan=FEED_FORWARD_ALONE)
    cache = KVCache(model.config, 2, 9, n_heads=model.base_model.n_key_heads)
    with torch.no_grad():
        expected = whole(PROMPT).logits
        return {
            "sampled": sampled(model, whole, rank),
            "streamed": torch.stack(list(model.stream(PROMPT, max_new_tokens=4)), dim=1),
            "streamed in one process": torch.stack(list(whole.stream(PROMPT, max_new_tokens=4)), dim=1),
            "error with a cache": (model(PROMPT, past_key_values=cache).logits - expected).abs().max().item(),
            "error of a copy": (copy.deepcopy(model)(PROMPT).logits - expected).abs().max().item(),
            "wrong when converted": differing_parts(half, whole.bfloat16(), n_ranks, rank),
            "own plan": own.tp_plan,
            "own plan's error": (own(PROMPT).logits - load(folder, UNEVEN)(PROMPT).logits).abs().max().item(),
            "laid out by own plan": {name for name, held in own.named_parameters() if isinstance(held, DTensor)},
        }


def find(folder: Path, n_ranks: int) -> Findings:
    rank = dist.get_rank()
    names = OF_FOUR_RANKS if n_ranks == 4 else CHECKPOINTS
    findings: Findings = {name: compared(folder, name, n_ranks, rank) for name in names}
    if n_ranks == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model, whole = load(folder, "llama", device_mesh=grid), load(folder, "llama")
        findings["wrong in a grid"] = differing_parts(model, whole, 2, grid["tp"].get_local_rank())
        return findings
    return findings | {"in use": in_use(folder, n_ranks, rank), "refusals": refusals(folder, n_ranks)}


if __name__ == "__main__":
    be_a_rank(find)
