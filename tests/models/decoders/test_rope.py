"""Rotary position embeddings: every kind, in old and new spellings, short of and beyond the length of training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_decoders import FAMILIES, SIZES, assert_close, pair, their_model, tokens

import fastload
from fastload.errors import ConfigError
from fastload.models.rope import RotaryEmbedding

N_TRAINED = 16
LONG = [1.0, 1.3, 1.7, 2.0, 3.0, 5.0, 8.0, 12.0]
SHORT = [1.0, 1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0]
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "another base": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": N_TRAINED},
    "yarn with all": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": N_TRAINED,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.4,
        "truncate": False,
    },
    "yarn with a factor for attention": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 4.0,
        "original_max_position_embeddings": N_TRAINED,
    },
    "longrope without a factor": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": N_TRAINED,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
each_kind = pytest.mark.parametrize("parameters", KINDS.values(), ids=KINDS)


@each_kind
@torch.no_grad()
def test_every_kind_gives_what_transformers_gives(parameters: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, "llama", rope_parameters=copy.deepcopy(parameters))
    # Beyond the length of training and back again: what a long text did must not stay.
    for length in (5, N_TRAINED, 40, 64, 90, 5):
        assert_close(ours(tokens(2, length)).logits, theirs(tokens(2, length)).logits)


@each_kind
@torch.no_grad()
def test_steps_across_the_length_of_training(parameters: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, "llama", rope_parameters=copy.deepcopy(parameters))
    cache, theirs_cache = fastload.KVCache(ours.config, 1, 70), None
    text = tokens(1, 70)
    for begin, end in ((0, 12), (12, 13), (13, 18), (18, 66), (66, 70)):
        expected = theirs(text[:, begin:end], past_key_values=theirs_cache, use_cache=True)
        theirs_cache = expected.past_key_values
        assert_close(ours(text[:, begin:end], past_key_values=cache).logits, expected.logits)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "qwen3_moe"])
@torch.no_grad()
def test_other_families_stretch_too(family: str, tmp_path: Path) -> None:
    for number, name in enumerate(("linear", "yarn", "llama3")):
        theirs, ours = pair(tmp_path / str(number), family, rope_parameters=copy.deepcopy(KINDS[name]))
        assert_close(ours(tokens(1, 40)).logits, theirs(tokens(1, 40)).logits)


@torch.no_grad()
def test_types_of_layers_have_parameters_of_their_own(tmp_path: Path) -> None:
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20_000.0},
        "sliding_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 50.0},
    }
    theirs, ours = pair(tmp_path, "gemma3_text", rope_parameters=parameters)
    for length in (9, 80):
        assert_close(ours(tokens(1, length)).logits, theirs(tokens(1, length)).logits)
    config = ours.config
    config.layer_types = ["full_attention"] * 3
    del config.rope_parameters["full_attention"]
    config.rope_parameters["sliding_attention"] = {}
    config.validate()
    assert config.rope_parameters["full_attention"] == {"rope_theta": 1_000_000.0, "rope_type": "default"}


# Config files as they were written before there was rope_parameters.
OLD: dict[str, tuple[str, dict[str, Any]]] = {
    "a base": ("llama", {"rope_theta": 700.0, "rope_scaling": None}),
    "type": ("llama", {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "rope_type": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": {**KINDS["llama3"], "type": "llama3"}}),
    "no length": ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "a length outside": (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": N_TRAINED},
    ),
    "both spellings": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    ),
    "whole heads": ("llama", {"partial_rotary_factor": 1.0, "rope_theta": 700.0}),
    "nothing": ("mixtral", {}),
    "two bases": (
        "gemma3_text",
        {
            "rope_theta": 30_000.0,
            "rope_local_base_freq": 300.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window_pattern": 2,
        },
    ),
    "two bases and nothing else": ("gemma3_text", {"rope_scaling": None, "sliding_window_pattern": 3}),
}


@pytest.mark.parametrize(("family", "fields"), OLD.values(), ids=OLD)
@torch.no_grad()
def test_old_spellings_mean_the_same(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    their_model(family).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        values.pop(name, None)
    file.write_text(json.dumps({**values, **fields}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = fastload.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ours.config.rope_parameters == theirs.config.rope_parameters
    for length in (9, 50):
        assert_close(ours(tokens(1, length)).logits, theirs(tokens(1, length)).logits)
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_close(again(tokens(1, 50)).logits, theirs(tokens(1, 50)).logits)


def test_a_kind_that_is_set_later_counts(tmp_path: Path) -> None:
    their_model("llama").save_pretrained(tmp_path)
    config = fastload.LlamaConfig.from_pretrained(tmp_path)
    config.rope_scaling = {"type": "linear", "factor": 2.0}
    ours = fastload.LlamaModel(config)
    assert ours.config.rope_parameters["rope_type"] == "linear"
    again = fastload.LlamaModel.from_pretrained(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    assert torch.equal(again.rotary_emb.inv_freq, ours.rotary_emb.inv_freq)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_frequencies_are_real_and_float32_whatever_the_weights_are(family: str, tmp_path: Path) -> None:
    their_model(family).save_pretrained(tmp_path)
    expected = dict(RotaryEmbedding(fastload.AutoConfig.from_pretrained(tmp_path)).named_buffers())
    assert len(expected) == (2 if family == "gemma3_text" else 1)
    loaded = fastload.AutoModel.from_pretrained(tmp_path, dtype="bfloat16")
    for model in (loaded, loaded.to(torch.float64), loaded.half(), fastload.AutoModel.from_pretrained(tmp_path)):
        found = dict(model.rotary_emb.named_buffers())
        assert found.keys() == expected.keys()
        for name, frequencies in expected.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], frequencies)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_frequencies_in_old_files_are_left_out_without_a_word(name: str, tmp_path: Path) -> None:
    theirs = their_model("llama")
    theirs.save_pretrained(tmp_path, state_dict={**theirs.state_dict(), name: torch.ones(8)})
    ours, info = fastload.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, strict=True)
    assert not info["unexpected_keys"]
    assert not torch.equal(ours.model.rotary_emb.inv_freq, torch.ones(8))


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"rope_type": "spiral"}, "rope_parameters.rope_type"),
        ({"rope_type": ["linear"]}, "rope_parameters.rope_type"),
        ({"rope_type": "linear"}, "rope_parameters.factor"),
        ({"rope_type": "linear", "factor": "two"}, "rope_parameters.factor"),
        ({"rope_type": "dynamic", "factor": 0}, "rope_parameters.factor"),
        ({"rope_type": "dynamic", "factor": True}, "rope_parameters.factor"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_parameters.rope_theta"),
        ({"rope_type": "default", "rope_theta": float("nan")}, "rope_parameters.rope_theta"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "rope_parameters.high_freq_factor"),
        ({**KINDS["longrope"], "long_factor": [1.0, 2.0]}, "rope_parameters.long_factor"),
        ({**KINDS["longrope"], "short_factor": 3}, "rope_parameters.short_factor"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_file_and_field(
    parameters: dict[str, Any], key: str, tmp_path: Path
) -> None:
    values = {**SIZES, **FAMILIES["llama"], "model_type": "llama", "rope_parameters": parameters}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as raised:
        fastload.AutoConfig.from_pretrained(tmp_path)
    assert raised.value.key == key
    assert raised.value.file == str(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=key):
        fastload.LlamaModel(fastload.LlamaConfig(**values))


def test_parameters_that_are_no_object() -> None:
    for fields in ({"rope_scaling": "linear"}, {"rope_parameters": [1]}):
        with pytest.raises(ConfigError, match="rope_parameters"):
            fastload.LlamaConfig(**fields)
    with pytest.raises(ConfigError, match="rope_parameters"):
        fastload.Gemma3TextConfig(rope_parameters={"full_attention": 3})
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": None}
    config = fastload.Qwen2Config(
        num_hidden_layers=2,
        use_sliding_window=True,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters=nested,
    )
    with pytest.raises(ConfigError, match=r"rope_parameters\.sliding_attention"):
        config.validate()
