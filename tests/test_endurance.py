"""A thousand loads in one process leave no memory, no mapping, no descriptor and no thread behind."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import fastload
from fastload.storage.memory import private_bytes
from fastload.storage.remapping import mappings_left
from tests.test_from_pretrained import TINY
from tests.test_fused_loading import SIZES, load, write


def what_is_held() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = sum(".safetensors" in line or ".bin" in line for line in maps)
    return {
        "file mappings": mapped,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "remapping budget": mappings_left(),
    }


def repeat(n_loads: int, load_once: Any) -> None:
    for _ in range(n_loads // 5):
        load_once()
    before, before_bytes = what_is_held(), private_bytes()
    for _ in range(n_loads):
        load_once()
    assert what_is_held() == before
    after_bytes = private_bytes()
    assert before_bytes is not None
    assert after_bytes is not None
    assert after_bytes - before_bytes < 4_000_000


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_thousand_loads_of_a_model(tmp_path: Path, safe: bool) -> None:
    fastload.BertModel(fastload.BertConfig(**TINY)).save_pretrained(tmp_path, safe_serialization=safe)
    repeat(1000, lambda: fastload.AutoModel.from_pretrained(tmp_path))


def test_hundreds_of_casts(tmp_path: Path) -> None:
    fastload.BertModel(fastload.BertConfig(**TINY)).save_pretrained(tmp_path)
    repeat(300, lambda: fastload.AutoModel.from_pretrained(tmp_path, dtype="bfloat16"))


def test_hundreds_of_fused_loads(tmp_path: Path) -> None:
    write(tmp_path, *SIZES, torch.bfloat16, 2)
    repeat(300, lambda: load(tmp_path, SIZES, torch.bfloat16))
