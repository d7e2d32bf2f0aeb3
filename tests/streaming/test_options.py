"""What lazy, stream and memory_budget can be told, and what they cannot be told together."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

import fastload
from fastload import hf
from fastload.errors import OptionError
from fastload.models.bert_heads import BertForMaskedLM
from fastload.storage.memory import available_bytes
from fastload.streaming.arrivals import parse_memory_budget
from tests.streaming.stacks import BLOCK_BYTES, n_hooks, names_on_meta, on_meta, output

CONTRADICTIONS: list[dict[str, Any]] = [
    {"lazy": True, "stream": True},
    {"lazy": True, "memory_budget": "1GB"},
    {"stream": True, "memory_budget": 10**9},
    {"lazy": True, "detached": True},
    {"stream": True, "detached": True},
    {"memory_budget": "1GB", "detached": True},
]


@pytest.mark.parametrize("options", CONTRADICTIONS, ids=" and ".join)
def test_options_that_exclude_each_other(written: Callable[[str], Path], stack_file: Path, options: Any) -> None:
    model = on_meta()
    with pytest.raises(OptionError, match="exclude each other") as caught:
        fastload.load_model(model, stack_file, **options)
    assert all(name.removesuffix("_bytes") in str(caught.value) for name in options)
    assert len(names_on_meta(model)) == len(model.state_dict())
    with pytest.raises(OptionError, match="exclude each other"):
        BertForMaskedLM.from_pretrained(written("bert"), **options)
    if "detached" not in options:
        with pytest.raises(OptionError, match="exclude each other"):
            hf.AutoModelForMaskedLM.from_pretrained(written("bert"), **options)


@pytest.mark.parametrize("options", [{"lazy": True}, {"stream": True}, {"memory_budget": "1GB"}], ids=" and ".join)
def test_what_transformers_places_cannot_arrive_later(written: Callable[[str], Path], options: Any) -> None:
    quantized = transformers.FineGrainedFP8Config(weight_block_size=(64, 64), dequantize=True)
    with pytest.raises(OptionError, match="cannot arrive later") as caught:
        hf.AutoModelForCausalLM.from_pretrained(written("llama"), quantization_config=quantized, **options)
    assert "quantizer" in str(caught.value)


def test_a_budget_is_for_weights_in_files(written: Callable[[str], Path]) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(written("llama"))
    given = {"config": model.config, "state_dict": model.state_dict()}
    with hf.enabled(), pytest.raises(OptionError, match="in memory already") as caught:
        type(model).from_pretrained(None, memory_budget="1GB", **given)
    assert "state_dict" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "n_bytes"),
    [(None, None), (12345, 12345), ("1GB", 10**9), ("1GiB", 1 << 30), ("1.5MB", 1_500_000)],
)
def test_a_budget_is_a_number_or_a_size(given: Any, n_bytes: int | None) -> None:
    assert parse_memory_budget(given) == n_bytes


def test_auto_is_most_of_what_is_free() -> None:
    found = parse_memory_budget("auto")
    free = available_bytes()
    assert found is not None
    assert free is not None
    assert 0.6 * free < found < 0.9 * free


@pytest.mark.parametrize("nonsense", ["much", "1XB", "", "-1GB", 0, -5, "GB", 1.5, True, [1]])
def test_nonsense_is_refused_by_name(stack_file: Path, nonsense: Any) -> None:
    with pytest.raises(OptionError, match="memory_budget") as caught:
        fastload.load_model(on_meta(), stack_file, memory_budget=nonsense)
    assert str(nonsense) in str(caught.value)


@pytest.mark.parametrize("budget", ["1GB", "auto", 10**9])
def test_a_budget_that_holds_everything_leaves_an_ordinary_model(stack_file: Path, budget: Any) -> None:
    model = on_meta()
    fastload.load_model(model, stack_file, memory_budget=budget)
    assert n_hooks(model) == 0
    assert names_on_meta(model) == set()


@pytest.mark.parametrize("budget", [1, 1000, 2 * BLOCK_BYTES])
def test_a_budget_that_is_too_small_says_what_it_takes(stack_file: Path, budget: int) -> None:
    model = on_meta()
    with pytest.raises(OptionError, match="too small") as caught:
        fastload.load_model(model, stack_file, memory_budget=budget)
    message = str(caught.value)
    assert re.search(r"key: +blocks\.\d", message)
    assert re.search(r"at least [\d.]+ [kM]B: ", message)
    assert len(names_on_meta(model)) == len(model.state_dict())


def test_a_model_without_blocks_has_to_fit(stack_file: Path, tmp_path: Path) -> None:
    tensors = load_file(stack_file)
    save_file({key[9:]: tensors[key] for key in tensors if key.startswith("blocks.0.")}, tmp_path / "model.safetensors")
    block = on_meta().blocks[0]
    with pytest.raises(OptionError, match="the parts outside of blocks"):
        fastload.load_model(block, tmp_path, memory_budget=1000)
    fastload.load_model(block, tmp_path, memory_budget=BLOCK_BYTES)
    assert names_on_meta(block) == set()


def test_limits_of_the_ecosystem_are_a_budget(written: Callable[[str], Path]) -> None:
    expected = output(BertForMaskedLM.from_pretrained(written("bert")))
    limited = BertForMaskedLM.from_pretrained(
        written("bert"), device_map="auto", max_memory={"cpu": "400KB"}, torch_dtype="auto"
    )
    assert n_hooks(limited) > 0
    assert output(limited).equal(expected)
    assert output(limited).equal(expected)
