"""Weights that arrive later, or for each forward, on CUDA."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import fastload
from fastload import hf
from tests.cold import make_cold, wait_for_no_threads
from tests.streaming.stacks import TOKENS, names_on_meta, on_meta, output, write_stack

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
IDS = torch.arange(1, 9).unsqueeze(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of eight blocks of 25 MB."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = fastload.LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    fastload.LlamaForCausalLM(config).save_pretrained(path)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS.to(DEVICE)).logits
    return found.cpu()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_cold", [False, True])
@pytest.mark.parametrize("way", [{"stream": True}, {"lazy": True}], ids=" and ".join)
@pytest.mark.parametrize("face", [fastload, hf])
def test_a_forward_right_after_the_load_is_right(
    folder: Path, face: Any, way: dict[str, bool], is_cold: bool, dtype: str
) -> None:
    expected = logits(face.AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE, dtype=dtype))
    if is_cold:
        make_cold(folder / "model.safetensors")
    model = face.AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE, dtype=dtype, **way)
    assert model.device == torch.device(DEVICE)
    assert torch.equal(logits(model), expected)
    fastload.wait(model)
    assert {parameter.device for parameter in model.parameters()} == {torch.device(DEVICE)}
    wait_for_no_threads()


@pytest.mark.parametrize("face", [fastload, hf])
def test_a_model_larger_than_its_budget_runs_within_it(folder: Path, face: Any) -> None:
    expected = logits(face.AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE, dtype="float32"))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = face.AutoModelForCausalLM.from_pretrained(
        folder, device_map=DEVICE, dtype="float32", memory_budget=110_000_000
    )
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    # The budget is of weights; activations of eight tokens come on top, and what cuBLAS takes for itself.
    assert torch.cuda.max_memory_allocated() - before < 110_000_000 + (64 << 20)


def test_what_does_not_fit_passes_through_the_device(folder: Path) -> None:
    expected = logits(fastload.AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE, dtype="float32"))
    model = fastload.AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", dtype="float32", max_memory={0: "150MB", "cpu": "10GB"}
    )
    assert "cpu" in model.hf_device_map.values()
    for _ in range(2):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("face", [fastload, hf])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_blocks_beside_the_device_come_to_it(folder: Path, place: str, face: Any) -> None:
    expected = logits(face.AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE, dtype="float32"))
    device_map: dict[str, int | str] = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], 0)
    device_map |= {f"model.layers.{number}": 0 if number < 3 else place for number in range(8)} | {"lm_head": place}
    model = face.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype="float32")
    for _ in range(3):
        assert torch.equal(logits(model), expected)
        assert {name for name, one in model.named_parameters() if one.is_meta} == {
            name for name, _ in model.named_parameters() if name.startswith(PASSING)
        }
    del model
    gc.collect()
    wait_for_no_threads()


def test_blocks_beside_the_device_come_to_any_module(tmp_path: Path) -> None:
    write_stack(tmp_path / "model.safetensors")
    ordinary, model = on_meta(), on_meta()
    fastload.load_model(ordinary, tmp_path, device=DEVICE)
    fastload.load_model(model, tmp_path, device_map={"": 0, "embed": "cpu", "blocks.1": "disk", "blocks.4": "cpu"})
    for _ in range(3):
        assert {name.rpartition(".")[0] for name in names_on_meta(model)} >= {"embed", "blocks.1.up", "blocks.4.down"}
        assert torch.equal(output(model), output(ordinary, TOKENS.to(DEVICE)).cpu())


PASSING = (*(f"model.layers.{number}." for number in range(3, 8)), "lm_head.")
