"""Configs of decoders: transformers' fields and defaults, whole through files in both directions, clear when wrong."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from small_decoders import FAMILIES, SIZES, each_family

import fastload
from fastload.errors import ConfigError
from fastload.models.decoder_config import DecoderConfig

# Configs as they are found on the hub, shortened: the fields in which they differ from what is written today.
REAL: dict[str, dict[str, Any]] = {
    "Llama-2": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
    },
    "Llama-3.1": {
        "model_type": "llama",
        "eos_token_id": [128001, 128008, 128009],
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    },
    "TinyLlama": {"model_type": "llama", "hidden_size": 2048, "num_key_value_heads": 4, "rope_theta": 10000.0},
    "Mistral-7B-v0.1": {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096},
    "Mistral-7B-v0.3": {"model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None, "head_dim": 128},
    "Mixtral": {
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "rope_theta": 1000000.0,
    },
    "Qwen2.5": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "num_hidden_layers": 24,
        "max_window_layers": 21,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_mrope": False,
        "tie_word_embeddings": True,
    },
    "Qwen3": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "num_experts": 128,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
    },
    "gemma-2b": {"model_type": "gemma", "hidden_act": "gelu", "num_key_value_heads": 1, "rope_theta": 10000.0},
    "gemma-2-2b": {
        "model_type": "gemma2",
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 10000.0,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "cache_implementation": "hybrid",
        "num_key_value_heads": 1,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "embeddinggemma": {
        "model_type": "gemma3_text",
        "_sliding_window_pattern": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "use_bidirectional_attention": True,
        "sliding_window": 512,
    },
    "old types of layers": {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["attention"]},
}


# A field for generation, which transformers drops and fastload keeps as it found it.
GENERATION = "cache_implementation"


def comparable(config: Any) -> dict[str, Any]:
    """The fields of a config, without those that say where it came from."""
    left_out = ("transformers_version", "_name_or_path", GENERATION)
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def both(values: dict[str, Any]) -> tuple[Any, Any]:
    fields = {name: value for name, value in values.items() if name != "model_type"}
    ours = fastload.AutoConfig.for_model(values["model_type"], **copy.deepcopy(fields))
    return ours, transformers.AutoConfig.for_model(values["model_type"], **copy.deepcopy(fields))


@pytest.mark.parametrize("values", REAL.values(), ids=REAL)
def test_is_what_transformers_makes_of_the_same_fields(values: dict[str, Any]) -> None:
    ours, theirs = both(values)
    assert comparable(ours) == comparable(theirs)
    ours.validate()


@each_family
def test_defaults_are_those_of_transformers(family: str) -> None:
    ours, theirs = both({"model_type": family})
    assert comparable(ours) == comparable(theirs)
    assert type(ours).__name__ == type(theirs).__name__
    assert type(ours) is getattr(fastload, type(ours).__name__)
    ours, theirs = both({"model_type": family, **SIZES, **FAMILIES[family], "num_labels": 3})
    assert comparable(ours) == comparable(theirs)
    assert ours.num_labels == 3


@pytest.mark.parametrize("values", REAL.values(), ids=REAL)
def test_files_are_read_by_the_other_library(values: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both({name: value for name, value in values.items() if name != GENERATION})
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    texts = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert {**texts[0], "transformers_version": ""} == {**texts[1], "transformers_version": ""}
    assert comparable(transformers.AutoConfig.from_pretrained(tmp_path / "ours")) == comparable(theirs)
    assert comparable(fastload.AutoConfig.from_pretrained(tmp_path / "theirs")) == comparable(ours)


def test_what_a_caller_hands_in_is_left_alone() -> None:
    scaling, types = {"type": "linear", "factor": 2.0}, ["attention", "full_attention"]
    config = fastload.Qwen2Config(rope_scaling=scaling, layer_types=types, num_hidden_layers=2)
    assert scaling == {"type": "linear", "factor": 2.0}
    assert types == ["attention", "full_attention"]
    assert config.layer_types == ["full_attention", "full_attention"]


def test_other_names_of_fields() -> None:
    config = fastload.Qwen3MoeConfig(num_experts=7)
    assert (config.num_experts, config.num_local_experts) == (7, 7)
    assert config.rope_scaling == config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("family", "fields", "key"),
    [
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("llama", {"hidden_size": 30, "head_dim": None}, "hidden_size"),
        ("llama", {"head_dim": 7}, "head_dim"),
        ("llama", {"hidden_size": 2, "head_dim": None, "num_key_value_heads": None}, "head_dim"),
        ("llama", {"pad_token_id": 97}, "pad_token_id"),
        ("llama", {"hidden_size": "wide"}, "hidden_size"),
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, "sliding_window"),
        ("qwen3", {"layer_types": [[], {}, 3]}, "layer_types"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3_text", {"sliding_window_pattern": "2"}, "sliding_window_pattern"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ("mixtral", {"num_local_experts": 0}, "num_experts_per_tok"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("llama", {"check_relations": 1}, "check_relations"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_file_and_field(
    family: str, fields: dict[str, Any], key: str, tmp_path: Path
) -> None:
    values = {**SIZES, **FAMILIES[family], **fields, "model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as raised:
        fastload.AutoConfig.from_pretrained(tmp_path)
    assert raised.value.key == key
    assert raised.value.file == str(tmp_path / "config.json")


def test_an_unknown_activation_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown activation"):
        fastload.LlamaModel(fastload.LlamaConfig(**{**SIZES, "hidden_act": "sigmund"}))


def test_reading_a_config_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    fastload.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    code = (
        "import sys, fastload; fastload.AutoConfig.from_pretrained(sys.argv[1]); fastload.Gemma3TextConfig();"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_family_of_ones_own_may_be_built_on_another() -> None:
    class OwnConfig(fastload.Qwen3Config):
        model_type = "own_decoder"
        head_dim: int = 16

    config = OwnConfig(**{**SIZES, "num_hidden_layers": 1})
    assert isinstance(config, DecoderConfig)
    assert fastload.Qwen3Model(config).layers[0].self_attn.q_norm is not None
