"""What fastload loads is, in everything that can be noticed, what transformers loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastload import hf
from tests.hf.families import FAMILIES, build, model_class
from tests.hf.sides import assert_same_load, assert_same_models, assert_same_outcome

Written = Callable[..., Path]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_loaded_as_by_transformers(written: Written, family: str, dtype: str) -> None:
    loaded = assert_same_load(model_class(family), written(family), dtype=dtype)
    assert loaded.info["missing_keys"] == loaded.info["unexpected_keys"] == "[]"


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_that_straddle_shards_are_fused_as_by_transformers(written: Written, family: str, dtype: str) -> None:
    folder = written(family, max_shard_size="7KB")
    shards = sorted(folder.glob("*.safetensors"))
    with_first_layer = [shard.name for shard in shards if any(".layers.1." in key for key in keys_of(shard))]
    assert len(with_first_layer) > 1
    assert_same_load(model_class(family), folder, dtype=dtype)


def test_layers_that_shall_stay_in_float32_do(written: Written) -> None:
    with hf.enabled():
        model = transformers.T5ForConditionalGeneration.from_pretrained(written("t5"), dtype="float16")
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {name for name in dict(model.named_parameters()) if name.endswith("wo.weight")} != set()


@pytest.mark.parametrize(
    ("family", "stored", "asked"),
    [
        ("bert", "BertModel", "BertForSequenceClassification"),
        ("bert", "BertModel", "BertForMaskedLM"),
        ("bert", "BertForMaskedLM", "BertModel"),
        ("bert", "BertForPreTraining", "BertForTokenClassification"),
        ("gpt2", "GPT2Model", "GPT2LMHeadModel"),
        ("gpt2", "GPT2LMHeadModel", "GPT2Model"),
        ("llama", "LlamaModel", "LlamaForCausalLM"),
        ("llama", "LlamaForCausalLM", "LlamaForSequenceClassification"),
        ("qwen3_moe", "Qwen3MoeModel", "Qwen3MoeForCausalLM"),
        ("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeModel"),
        ("t5", "T5ForConditionalGeneration", "T5EncoderModel"),
        ("vit", "ViTModel", "ViTForImageClassification"),
        ("vit", "ViTForImageClassification", "ViTModel"),
        ("clip", "CLIPModel", "CLIPTextModel"),
        ("clip", "CLIPModel", "CLIPVisionModelWithProjection"),
        ("whisper", "WhisperForConditionalGeneration", "WhisperModel"),
        ("whisper", "WhisperModel", "WhisperForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration", "LlavaModel"),
    ],
)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_base_model_fills_one_with_a_head_and_the_other_way_round(
    written: Written, family: str, stored: str, asked: str, dtype: str
) -> None:
    assert_same_load(getattr(transformers, asked), written(family, stored), dtype=dtype)


def test_a_model_made_of_two_checkpoints(written: Written) -> None:
    parts = [written("vit", "ViTModel"), written("bert", "BertModel")]
    make = transformers.VisionEncoderDecoderModel.from_encoder_decoder_pretrained
    torch.manual_seed(0)
    expected = make(*parts)
    torch.manual_seed(0)
    hf.reset_stats()
    with hf.enabled():
        found = make(*parts)
    assert hf.stats().fast_loads == 2
    assert_same_models(expected, found)


def test_old_names_of_norms_are_understood(written: Written, tmp_path: Path) -> None:
    folder = rewritten(written("bert"), tmp_path, old_name_of_norm)
    assert any(key.endswith("LayerNorm.gamma") for key in keys_of(folder / "model.safetensors"))
    assert assert_same_load(transformers.BertForMaskedLM, folder).info["missing_keys"] == "[]"
    assert_same_load(transformers.BertModel, folder, dtype="bfloat16")


def test_names_that_the_model_does_not_know_are_told(written: Written, tmp_path: Path) -> None:
    folder = rewritten(written("bert"), tmp_path, lambda key: key.replace("layer.1.attention", "layer.9.attention"))
    loaded = assert_same_load(transformers.BertForMaskedLM, folder)
    assert "encoder.layer.9.attention.self.query.weight" in loaded.info["unexpected_keys"]
    assert "encoder.layer.1.attention.self.query.weight" in loaded.info["missing_keys"]


@pytest.mark.parametrize(
    ("family", "head", "embeddings"),
    [("gpt2", "lm_head.weight", "transformer.wte.weight"), ("t5", "lm_head.weight", "shared.weight")],
)
def test_a_tied_head_that_is_in_the_file_and_differs(
    written: Written, tmp_path: Path, family: str, head: str, embeddings: str
) -> None:
    other = load_file(written(family) / "model.safetensors")[embeddings] + 1
    folder = rewritten(written(family), tmp_path, str, {head: other})
    assert_same_load(model_class(family), folder)


def test_ties_that_the_config_undoes(tmp_path: Path) -> None:
    build("gpt2", tie_word_embeddings=False).save_pretrained(tmp_path)
    loaded = assert_same_load(transformers.GPT2LMHeadModel, tmp_path)
    assert loaded.model is not None
    assert loaded.model.lm_head.weight is not loaded.model.transformer.wte.weight


def test_weights_in_several_types_are_cast_to_what_is_asked_for(written: Written, tmp_path: Path) -> None:
    types = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    tensors = load_file(written("llama") / "model.safetensors")
    mixed = {key: tensor.to(types[number % 4]) for number, (key, tensor) in enumerate(tensors.items())}
    folder = rewritten(written("llama"), tmp_path, str, mixed)
    for dtype in ("auto", "bfloat16", "float32"):
        assert_same_load(transformers.LlamaForCausalLM, folder, dtype=dtype)


def test_experts_in_several_types_become_one(written: Written, tmp_path: Path) -> None:
    types = [torch.float32, torch.bfloat16, torch.float16]
    tensors = load_file(written("qwen3_moe") / "model.safetensors")
    mixed = {key: tensor.to(types[number % 3]) for number, (key, tensor) in enumerate(tensors.items())}
    folder = rewritten(written("qwen3_moe"), tmp_path, str, mixed)
    for dtype in ("auto", "bfloat16", "float32"):
        assert_same_load(transformers.Qwen3MoeForCausalLM, folder, dtype=dtype)


def test_experts_of_which_one_is_missing(written: Written, tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.experts.2.up_proj.weight"
    folder = rewritten(written("qwen3_moe"), tmp_path, lambda key: "" if key == lost else key)
    for ignored in (True, False):
        assert_same_outcome(transformers.Qwen3MoeForCausalLM, folder, ignore_mismatched_sizes=ignored)


def test_an_expert_of_another_shape(written: Written, tmp_path: Path) -> None:
    other = "model.layers.1.mlp.experts.2.up_proj.weight"
    folder = rewritten(written("qwen3_moe"), tmp_path, str, {other: torch.ones(3, 5)})
    for ignored in (True, False):
        assert_same_outcome(transformers.Qwen3MoeForCausalLM, folder, ignore_mismatched_sizes=ignored)


def keys_of(file: Path) -> list[str]:
    return list(load_file(file))


def old_name_of_norm(key: str) -> str:
    return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def rewritten(
    folder: Path, target: Path, rename: Callable[[str], str], others: dict[str, torch.Tensor] | None = None
) -> Path:
    """A copy of a checkpoint with other keys (without those that get no name), and with other tensors."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors") | (others or {})
    renamed = {rename(key): tensor for key, tensor in tensors.items() if rename(key)}
    save_file(renamed, target / "model.safetensors", {"format": "pt"})
    return target
