"""fastload's Auto classes with families that fastload has no architecture for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import fastload
from fastload.errors import ConfigError, OptionError
from fastload.hf import reset_stats, stats

SIZES = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "vocab_size": 50,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_a_family_without_a_native_class_is_transformers_own_loaded_by_fastload(gpt2: Path) -> None:
    reset_stats()
    model, info = fastload.AutoModelForCausalLM.from_pretrained(gpt2, output_loading_info=True, dtype=torch.bfloat16)
    assert type(model) is GPT2LMHeadModel
    assert (stats().fast_loads, stats().handed_over_loads) == (1, 0)
    assert not info["missing_keys"]
    expected = GPT2LMHeadModel.from_pretrained(gpt2, dtype=torch.bfloat16)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert fastload.report(model).bytes_by_action.keys() == {"cast"}


def test_the_choice_is_by_family_and_can_be_overridden(bert: Path) -> None:
    assert type(fastload.AutoModel.from_pretrained(bert)) is fastload.BertModel
    assert type(fastload.AutoModel.from_pretrained(bert, backend="transformers")) is transformers.BertModel
    assert type(fastload.AutoConfig.from_pretrained(bert, backend="transformers")) is BertConfig
    with pytest.raises(OptionError, match="no such backend"):
        fastload.AutoModel.from_pretrained(bert, backend="jax")


def test_native_is_an_error_where_there_is_no_native_class(gpt2: Path) -> None:
    with pytest.raises(ConfigError, match="gpt2"):
        fastload.AutoModel.from_pretrained(gpt2, backend="native")


def test_configs_fall_through_too(gpt2: Path) -> None:
    config, unused = fastload.AutoConfig.from_pretrained(gpt2, return_unused_kwargs=True, n_layer=1, colour="red")
    assert (type(config), config.n_layer, unused) == (GPT2Config, 1, {"colour": "red"})
    model = fastload.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    assert (type(model), model.dtype) == (GPT2LMHeadModel, torch.float16)
    assert (
        fastload.AutoModelForCausalLM.from_pretrained(gpt2, config=config, ignore_mismatched_sizes=True).config.n_layer
        == 1
    )


def test_tasks_that_no_native_family_has_are_there(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    model = fastload.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(model) is ViTForImageClassification
    with pytest.raises(AttributeError, match="AutoModelForTelepathy"):
        _ = fastload.AutoModelForTelepathy


def test_without_transformers_the_error_says_what_to_install(gpt2: Path, bert: Path) -> None:
    script = """
import sys
sys.modules["transformers"] = None
import fastload
print(type(fastload.AutoModel.from_pretrained(sys.argv[2])).__name__)
try:
    fastload.AutoModel.from_pretrained(sys.argv[1])
except fastload.FastloadError as error:
    print(type(error).__name__, error.fix)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(gpt2), str(bert)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "BertModel\nMissingDependencyError pip install 'fastload[hf]'\n"


def test_detached_is_understood(gpt2: Path) -> None:
    model = fastload.AutoModelForCausalLM.from_pretrained(gpt2, detached=True)
    with open("/proc/self/maps") as maps:
        assert str(gpt2) not in maps.read()
    assert model.transformer.wte.weight.isfinite().all()
