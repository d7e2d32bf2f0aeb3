"""Tiny checkpoints, written by those who define the formats."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fastload.formats.index import encode_index


def safetensors_bytes(*keys: str) -> bytes:
    return save({key: np.arange(4, dtype=np.float32) for key in keys or ("weight",)})


def bin_bytes(*keys: str) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({key: torch.arange(4.0) for key in keys or ("weight",)}, buffer)
    return buffer.getvalue()


def sharded(index: str = "model.safetensors.index.json", shards: Iterable[str] | None = None) -> dict[str, bytes]:
    """Index and shards by name; shard i holds the key ``layer.i``."""
    shards = list(shards or (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)))
    weight_map = {f"layer.{i}": name for i, name in enumerate(shards)}
    files = {name: safetensors_bytes(f"layer.{i}") for i, name in enumerate(shards)}
    return {index: encode_index(weight_map, 4 * len(shards), 16 * len(shards)).encode(), **files}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


CONFIG = json.dumps({"model_type": "bert"}).encode()
