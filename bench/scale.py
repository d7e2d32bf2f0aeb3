"""Checkpoints of a terabyte on a thousand ranks, planned: ``python bench/scale.py [--ranks N] [--tp N]``.

Writes the headers and the index of two checkpoints, a dense one and a mixture of experts, whose weights are holes in
sparse files, and prints what ``fastload plan --ranks`` says of them. No weight is ever read.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

import fastload
from fastload.cli import main as fastload_command
from fastload.dtypes import from_torch
from fastload.formats.index import encode_index
from fastload.formats.safetensors_layout import encode_header
from fastload.models.skeleton import skeleton
from fastload.plan.sharding import parse_size, split_into_shards

_MODELS = {
    "dense: Llama 3.1 405B with 155 layers instead of 126": lambda: fastload.LlamaForCausalLM(
        fastload.LlamaConfig(
            vocab_size=128_256,
            hidden_size=16_384,
            intermediate_size=53_248,
            num_hidden_layers=155,
            num_attention_heads=128,
            num_key_value_heads=8,
            dtype=torch.bfloat16,
        )
    ),
    "experts: Qwen3 235B A22B with twice the layers": lambda: fastload.Qwen3MoeForCausalLM(
        fastload.Qwen3MoeConfig(
            vocab_size=151_936,
            hidden_size=4_096,
            intermediate_size=12_288,
            moe_intermediate_size=1_536,
            num_hidden_layers=200,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            dtype=torch.bfloat16,
        )
    ),
}


def main() -> int:
    """Write and plan each. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tp", type=int, default=8)
    options = parser.parse_args()
    for title, build in _MODELS.items():
        with tempfile.TemporaryDirectory() as name:
            with skeleton():
                model = build().to(torch.bfloat16)
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(name)
            _write_headers(Path(name), model._as_in_files(model.state_dict()))
            print(f"{title}\n", flush=True)
            if status := fastload_command(["plan", name, "--ranks", str(options.ranks), "--tp", str(options.tp)]):
                return status
            print(flush=True)
    return 0


def _write_headers(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    sizes = {key: tensor.nbytes for key, tensor in tensors.items()}
    shards = split_into_shards(sizes, parse_size("5GB"))
    weight_map = {}
    for number, keys in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, offsets = encode_header(
            [(key, from_torch(tensors[key].dtype), tuple(tensors[key].shape)) for key in keys]
        )
        file.write_bytes(header)
        os.truncate(file, max(offsets[key] + sizes[key] for key in keys))
        weight_map |= dict.fromkeys(keys, file.name)
    n_elements = sum(tensor.numel() for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(encode_index(weight_map, n_elements, sum(sizes.values())))


if __name__ == "__main__":
    sys.exit(main())
