"""Device maps of transformers' models: who is where is decided, and comes out, as in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.hf.families import FAMILIES, build, model_class
from tests.hf.sides import assert_same_load, assert_same_outcome

Written = Callable[..., Path]
Llama = transformers.LlamaForCausalLM


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", "balanced_low_0", "sequential", "cpu", {"": "cpu"}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_fits_is_all_in_one_place(written: Written, family: str, device_map: Any, dtype: str) -> None:
    options: dict[str, Any] = {"max_memory": {"cpu": "1GB"}} if isinstance(device_map, str) else {}
    assert_same_load(model_class(family), written(family), device_map=device_map, dtype=dtype, **options)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["name", "device"])
def test_a_device_around_the_load_counts(written: Written, device: Any) -> None:
    with torch.device(device):
        assert_same_load(Llama, written("llama"))


def test_everything_on_meta_has_no_values(written: Written) -> None:
    loaded = assert_same_load(Llama, written("llama"), device_map="meta")
    assert loaded.model is not None
    assert all(parameter.is_meta for parameter in loaded.model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "t5"])
def test_a_map_of_every_parameter(written: Written, family: str) -> None:
    device_map = dict.fromkeys(build(family).state_dict(), "cpu")
    assert_same_load(model_class(family), written(family), device_map=device_map, dtype="bfloat16")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "t5"])
def test_a_map_of_every_module(written: Written, family: str) -> None:
    model = build(family)
    device_map = {name: "cpu" for name, module in model.named_modules() if name and not list(module.children())}
    assert_same_load(model_class(family), written(family), device_map=device_map)


def test_a_map_of_four_hundred_modules(tmp_path: Path) -> None:
    build("llama", num_hidden_layers=40).save_pretrained(tmp_path)
    device_map = {f"model.layers.{layer}.{part}": "cpu" for layer in range(40) for part in PARTS}
    device_map |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    assert len(device_map) > 360
    assert_same_load(Llama, tmp_path, device_map=device_map)


PARTS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
]


def test_names_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    build("llama", num_hidden_layers=12).save_pretrained(tmp_path / "model")
    device_map = {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(12)}
    device_map |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    loaded = assert_same_load(Llama, tmp_path / "model", **options)
    assert loaded.model is not None
    on_disk = {name for name, parameter in loaded.model.named_parameters() if parameter.is_meta}
    assert {name.rpartition(".layers.")[2].split(".")[0] for name in on_disk} == {"1"}


@pytest.mark.parametrize(
    "device_map",
    ["everywhere", -1, {"model.embed_tokens": "cpu", "model.layers": "disk"}],
    ids=str,
)
def test_a_map_that_cannot_be_meant_fails_as_in_transformers(written: Written, tmp_path: Path, device_map: Any) -> None:
    failed = assert_same_outcome(Llama, written("llama"), device_map=device_map, offload_folder=tmp_path)
    assert failed.error


@pytest.mark.parametrize(
    "device_map",
    [{"nothing": "cpu", "": "cpu"}, {"nothing": "cpu", "": "disk"}, {"model.embed_tokens": "cpu"}],
    ids=str,
)
def test_a_map_may_name_too_much_or_too_little(written: Written, tmp_path: Path, device_map: Any) -> None:
    assert_same_load(Llama, written("llama"), device_map=device_map, offload_folder=tmp_path)
