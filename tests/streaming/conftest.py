"""Checkpoints of small models, written once for all tests, and copies of them to be damaged."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.cold import wait_for_no_threads
from tests.streaming.stacks import write_stack

LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# An expert is 192 KiB, more than the kernel reads ahead for its neighbours.
MOE = LLAMA | {"head_dim": 16, "moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 2}
BERT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "max_position_embeddings": 32,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MOE)),
}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's small model, as transformers writes it; to be read only."""
    folders: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in folders:
            torch.manual_seed(0)
            folders[family] = tmp_path_factory.mktemp(family)
            FAMILIES[family]().save_pretrained(folders[family])
        return folders[family]

    return write


@pytest.fixture
def copied(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's folder, to be damaged."""
    return lambda family: Path(shutil.copytree(written(family), tmp_path / family))


@pytest.fixture(scope="session")
def stack_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stack") / "model.safetensors"
    write_stack(path)
    return path


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    wait_for_no_threads(5)
