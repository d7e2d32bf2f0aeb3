"""Checkpoints of real shapes, written at the speed of the page cache: random weights, no model built.

The files are as those of a hub: tensors in alphabetical order, several shards and their index, a header that is padded
to 8 bytes and no more.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["FULL", "SMALL", "Shape", "is_made", "make"]

_BLOCK_BYTES = 16 << 20
_SPARE_BYTES = 2 << 30
_ITEM_BYTES = {"BF16": 2, "F32": 4}
# What a salt may change in 8 bytes of values: low bits of mantissas, so that none becomes infinite or NaN.
_SALTED_BITS = {"BF16": 0x003F_003F_003F_003F, "F32": 0x0003_FFFF_0003_FFFF}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder: Llama's, or with experts Qwen3-MoE's, in files that hold a tensor for each expert and matrix."""

    name: str
    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head: int
    vocabulary: int
    n_experts: int = 0
    dtype: str = "BF16"
    n_shards: int = 4

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return _total_bytes(self)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by key, in the order of use."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.n_layers):
            found |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer()}
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def n_tensors(self) -> int:
        """How many there are in the files."""
        return 3 + self.n_layers * sum(1 for _ in self._layer())

    def config(self) -> dict[str, Any]:
        """The config.json."""
        fields: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM" if self.n_experts else "LlamaForCausalLM"],
            "model_type": "qwen3_moe" if self.n_experts else "llama",
            "torch_dtype": "bfloat16" if self.dtype == "BF16" else "float32",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        }
        if self.n_experts:
            fields |= {
                "num_experts": self.n_experts,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": self.intermediate,
                "decoder_sparse_step": 1,
                "norm_topk_prob": True,
            }
        return fields

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        width, kv_width = self.n_heads * self.head, self.n_kv_heads * self.head
        yield "input_layernorm.weight", (self.hidden,)
        yield "self_attn.q_proj.weight", (width, self.hidden)
        yield "self_attn.k_proj.weight", (kv_width, self.hidden)
        yield "self_attn.v_proj.weight", (kv_width, self.hidden)
        yield "self_attn.o_proj.weight", (self.hidden, width)
        yield "post_attention_layernorm.weight", (self.hidden,)
        if self.n_experts:
            yield "self_attn.q_norm.weight", (self.head,)
            yield "self_attn.k_norm.weight", (self.head,)
            yield "mlp.gate.weight", (self.n_experts, self.hidden)
        for prefix in [f"mlp.experts.{n}" for n in range(self.n_experts)] or ["mlp"]:
            yield f"{prefix}.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.down_proj.weight", (self.hidden, self.intermediate)


_LLAMA_8B = Shape(
    name="dense",
    hidden=4096,
    intermediate=14336,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head=128,
    vocabulary=128256,
)
_TINY = replace(
    _LLAMA_8B, hidden=64, intermediate=160, n_layers=3, n_heads=4, n_kv_heads=2, head=16, vocabulary=512, n_shards=2
)

FULL: dict[str, Shape] = {
    # 16.06 GB in 291 tensors, as Llama 3 8B.
    "dense": _LLAMA_8B,
    # 5.2 GB in 20,046 tensors.
    "moe": Shape(
        name="moe",
        hidden=512,
        intermediate=256,
        n_layers=51,
        n_heads=8,
        n_kv_heads=2,
        head=64,
        vocabulary=32000,
        n_experts=128,
        n_shards=6,
    ),
    # 8.0 GB in 75 tensors.
    "fp32": replace(_LLAMA_8B, name="fp32", n_layers=8, vocabulary=32000, dtype="F32"),
    # 2.3 GB in 39 tensors: for storage that is too slow for 16 GB.
    "less": replace(_LLAMA_8B, name="less", n_layers=4, vocabulary=32000),
}
SMALL: dict[str, Shape] = {
    "dense": _TINY,
    "moe": replace(_TINY, name="moe", intermediate=32, n_experts=16),
    "fp32": replace(_TINY, name="fp32", dtype="F32"),
    "less": replace(_TINY, name="less", n_layers=1),
}


@cache
def _total_bytes(shape: Shape) -> int:
    return sum(_n_bytes(size, shape.dtype) for size in shape.tensors().values())


def is_made(folder: Path, shape: Shape) -> bool:
    """Whether a folder has this very checkpoint. Its config is written last."""
    try:
        return bool(json.loads((folder / "config.json").read_text()) == shape.config())
    except (OSError, ValueError):
        return False


def make(folder: Path, shape: Shape) -> None:
    """Write a checkpoint, a thread a shard. What the folder held before is gone.

    Raises:
        OSError: there is not enough room.
    """
    if is_made(folder, shape):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < shape.n_bytes + _SPARE_BYTES:
        raise OSError(
            f"{folder} has room for {free_bytes / 1e9:.1f} GB, and {shape.name} needs {shape.n_bytes / 1e9:.1f} GB "
            f"and {_SPARE_BYTES / 1e9:.1f} to spare: name another --folder"
        )
    shards = _shards(shape)
    names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    pattern = _pattern(shape.dtype)
    with ThreadPoolExecutor(len(shards)) as threads:
        written = [
            threads.submit(_write_shard, folder / name, shard, shape.dtype, pattern, seed)
            for seed, (name, shard) in enumerate(zip(names, shards, strict=True))
        ]
        for shard_written in written:
            shard_written.result()
    index = {
        "metadata": {"total_size": shape.n_bytes},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")


def _shards(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in shards of about equal size, layer after layer."""
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shape.n_shards)]
    shard_bytes, begin = -(-shape.n_bytes // shape.n_shards), 0
    for key, tensor_shape in shape.tensors().items():
        shards[begin // shard_bytes][key] = tensor_shape
        begin += _n_bytes(tensor_shape, shape.dtype)
    return [shard for shard in shards if shard]


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], dtype: str, pattern: Any, seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in sorted(shard):
        begin, end = end, end + _n_bytes(shard[key], dtype)
        header[key] = {"dtype": dtype, "shape": shard[key], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    block = np.empty_like(pattern)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end, _BLOCK_BYTES):
            # Every block has a salt of its own: no two are alike, and none holds zeros.
            np.bitwise_xor(pattern, rng.integers(1 << 62, dtype=np.uint64) & np.uint64(_SALTED_BITS[dtype]), out=block)
            left = memoryview(block).cast("B")[: min(_BLOCK_BYTES, end - at)]
            while left:
                left = left[os.write(file.fileno(), left) :]


def _pattern(dtype: str) -> Any:
    """A block of random weights as words of 8 bytes; of bf16 the upper halves of floats, cut off."""
    n_items = _BLOCK_BYTES // _ITEM_BYTES[dtype]
    values = np.random.default_rng(0).standard_normal(n_items, dtype=np.float32) * np.float32(0.02)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint64)
    return values.view(np.uint64)


def _n_bytes(shape: tuple[int, ...], dtype: str) -> int:
    n_items = 1
    for size in shape:
        n_items *= size
    return n_items * _ITEM_BYTES[dtype]
