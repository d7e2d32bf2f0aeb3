"""What loads hold: pages of the files and little of their own, until the last tensor is gone."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastload
from fastload import hf
from fastload.storage.memory import private_bytes
from fastload.storage.remapping import mappings_left
from tests.hf.families import LLAMA

Written = Callable[..., Path]
WIDE = LLAMA | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 MB."""
    folder = tmp_path_factory.mktemp("wide_llama")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """40 MB, most of it in six layers of experts, in one file and in two."""
    sizes = {"num_hidden_layers": 6, "moe_intermediate_size": 48, "num_experts": 16, "num_experts_per_tok": 2}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**WIDE | sizes, head_dim=64))
    folders = {name: tmp_path_factory.mktemp("wide_moe") for name in ("one file", "two files")}
    model.save_pretrained(folders["one file"])
    model.save_pretrained(folders["two files"], max_shard_size="22MB")
    return folders


@pytest.fixture
def moe(experts: dict[str, Path]) -> Path:
    return experts["two files"]


def added_bytes(load: Callable[[], Any]) -> tuple[int, int]:
    """Private memory that a load adds to one that is there already, and the size of its weights."""
    first = load()
    gc.collect()
    before = private_bytes()
    model = load()
    gc.collect()
    after = private_bytes()
    assert first is not None
    assert before is not None
    assert after is not None
    return after - before, sum(parameter.nbytes for parameter in model.parameters())


def test_a_load_adds_no_private_memory(llama: Path) -> None:
    added, size = added_bytes(lambda: hf.AutoModelForCausalLM.from_pretrained(llama))
    assert size > 28_000_000
    assert added < 2_000_000


def test_a_load_of_experts_adds_few_of_them(experts: dict[str, Path]) -> None:
    for form, share in (("one file", 0.05), ("two files", 0.05 + 0.5 / 6)):
        added, size = added_bytes(lambda form=form: hf.AutoModelForCausalLM.from_pretrained(experts[form]))
        assert size > 35_000_000
        # Of a layer that two files share, pages of one of them are copied.
        assert added < share * size


def test_experts_are_pages_of_the_files_which_transformers_copies(experts: dict[str, Path]) -> None:
    folder = experts["one file"]
    for autos, expected in ((hf, True), (transformers, False)):
        layers = autos.AutoModelForCausalLM.from_pretrained(folder).model.layers
        fused = [tensor for layer in layers for tensor in layer.mlp.experts.parameters()]
        assert {is_mapped(tensor, folder) for tensor in fused} == {expected}


def is_mapped(tensor: torch.Tensor, folder: Path) -> bool:
    """Whether a tensor's memory is pages of a file in a folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(edge, 16) for edge in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return str(folder) in line
    return False


def test_the_report_knows_what_was_added(llama: Path) -> None:
    reported = fastload.report(hf.AutoModelForCausalLM.from_pretrained(llama)).private_bytes
    assert reported is not None
    assert reported < 2_000_000


def what_is_held(folder: Path) -> dict[str, int]:
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = sum(str(folder) in line for line in maps)
    return {
        "mappings": mapped,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "remapping budget": mappings_left(),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_held_when_a_model_is_gone(llama: Path, moe: Path, dtype: str) -> None:
    for folder in (llama, moe):
        hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        before = what_is_held(folder)
        assert before["mappings"] == 0
        model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert what_is_held(folder)["mappings"] > 0 or dtype == "bfloat16"
        del model
        assert what_is_held(folder) == before


def test_one_tensor_that_is_kept_keeps_its_file(moe: Path) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(moe).model.layers[1].mlp.experts.gate_up_proj
    model = hf.AutoModelForCausalLM.from_pretrained(moe)
    kept = model.model.layers[1].mlp.experts.gate_up_proj.detach()
    del model
    assert what_is_held(moe)["mappings"] > 0
    assert torch.equal(kept, expected)
    del kept
    assert what_is_held(moe)["mappings"] == 0


def test_two_hundred_loads_leave_nothing_behind(written: Written) -> None:
    loads = [
        (hf.AutoModelForMaskedLM, written("bert"), "float32"),
        (hf.AutoModelForCausalLM, written("llama"), "bfloat16"),
        (hf.AutoModelForCausalLM, written("qwen3_moe", max_shard_size="7KB"), "float32"),
        (hf.AutoModel, written("bert", "BertForPreTraining"), "float16"),
    ]

    def repeat(times: int) -> None:
        for _ in range(times):
            for auto, folder, dtype in loads:
                auto.from_pretrained(folder, dtype=dtype)

    repeat(12)
    before, before_bytes = what_is_held(Path("safetensors")), private_bytes()
    repeat(50)
    assert what_is_held(Path("safetensors")) == before
    after_bytes = private_bytes()
    assert before_bytes is not None
    assert after_bytes is not None
    assert after_bytes - before_bytes < 4_000_000
