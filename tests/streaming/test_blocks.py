"""Which modules are blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastload.plan.slots import walk_modules
from fastload.streaming.blocks import REST, Units, find_units
from tests.streaming.conftest import BERT, LLAMA, MOE
from tests.streaming.stacks import Block


def units_of(build: Callable[[], nn.Module]) -> Units:
    with torch.device("meta"):
        return find_units(walk_modules(build()))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT))


def test_what_is_in_no_block_comes_first_and_then_the_blocks_in_order() -> None:
    assert units_of(bert).names == (REST, *(f"bert.encoder.layer.{i}" for i in range(4)))


def test_every_module_and_tensor_belongs_to_one_unit() -> None:
    units = units_of(bert)
    assert units.of_tensor("bert.encoder.layer.2.attention.self.query.weight") == "bert.encoder.layer.2"
    for outside in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        assert units.of_tensor(outside) == REST
    assert units.of_module["bert.encoder.layer"] == units.of_module[""] == REST
    with torch.device("meta"):
        assert set(units.of_module) == {name for name, _ in bert().named_modules(remove_duplicate=False)}


def test_an_encoder_and_a_decoder_have_both_their_blocks() -> None:
    sizes: dict[str, Any] = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    units = units_of(lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    assert units.names[1:] == tuple(f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(3))
    # A T5 block is a list of layers of its own: they belong to the block.
    assert units.of_tensor("decoder.block.1.layer.2.DenseReluDense.wi.weight") == "decoder.block.1"


@pytest.mark.parametrize(
    "build",
    [
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
        lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MOE)),
    ],
)
def test_layers_of_decoders(build: Callable[[], nn.Module]) -> None:
    assert units_of(build).names[1:] == tuple(f"model.layers.{i}" for i in range(4))


class MoeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(Block() for _ in range(4))


def test_a_list_of_experts_in_a_block_is_of_the_block() -> None:
    units = units_of(lambda: nn.ModuleList(MoeBlock() for _ in range(2)))
    assert units.names == (REST, "0", "1")
    assert units.of_tensor("1.experts.3.up.weight") == "1"


def test_a_sequential_of_one_kind_is_blocks() -> None:
    assert units_of(lambda: nn.Sequential(*(Block() for _ in range(3)))).names == (REST, "0", "1", "2")


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: nn.ModuleList(nn.Linear(4, 4) for _ in range(5)), id="plain layers, such as heads"),
        pytest.param(lambda: nn.Sequential(Block(), nn.Linear(64, 64)), id="several kinds"),
        pytest.param(lambda: nn.ModuleList([Block()]), id="only one"),
        pytest.param(lambda: nn.ModuleList(), id="none"),
        pytest.param(lambda: nn.Sequential(*(nn.Sequential(nn.ReLU()) for _ in range(3))), id="without parameters"),
        pytest.param(lambda: nn.ModuleDict({"a": Block(), "b": Block()}), id="without an order"),
        pytest.param(Block, id="no list at all"),
    ],
)
def test_without_repeated_blocks_everything_is_one_unit(build: Callable[[], nn.Module]) -> None:
    assert units_of(build).names == (REST,)
