"""from_pretrained and save_pretrained against transformers: what it writes we read, what we write it reads."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastload
from fastload.errors import (
    AmbiguousCheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    IndexFileError,
    KeyMatchError,
    OptionError,
)
from tests.conftest import same_bytes

HEADS = [
    "BertModel",
    "BertLMHeadModel",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForNextSentencePrediction",
    "BertForMultipleChoice",
]
TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def write_with_transformers(folder: Path, name: str = "BertModel", **options: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.BertConfig(**TINY)).eval()
    model.save_pretrained(folder, **options)
    return model


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def assert_same_state(a: Any, b: Any) -> None:
    state_a, state_b = state_of(a), state_of(b)
    assert list(state_a) == list(state_b)
    assert [name for name in state_a if not same_bytes(state_a[name], state_b[name])] == []


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(0, 60, (2, 9), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("name", HEADS)
def test_every_bert_class_gives_transformers_outputs(name: str, tmp_path: Path, inputs: Any) -> None:
    theirs = write_with_transformers(tmp_path, name)
    theirs.set_attn_implementation("eager")  # the only one of theirs that returns attentions
    ours = getattr(fastload, name).from_pretrained(tmp_path)
    assert_same_state(theirs, ours)
    if name == "BertForMultipleChoice":
        inputs = {key: tensor[None] for key, tensor in inputs.items()}
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True, output_attentions=True)
        found = ours(**inputs, output_hidden_states=True, output_attentions=True)
    assert list(found.keys()) == list(expected.keys())
    torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shard_size", ["5GB", "20kB"], ids=["single", "sharded"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_transformers_reads_what_we_write(name: str, shard_size: str, safe: bool, tmp_path: Path) -> None:
    write_with_transformers(tmp_path / "a", name)
    ours = getattr(fastload, name).from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b", max_shard_size=shard_size, safe_serialization=safe)
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values())
    assert_same_state(ours, theirs)
    again = getattr(fastload, name).from_pretrained(tmp_path / "b")
    assert_same_state(ours, again)
    assert again.config.architectures == [name]


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_we_read_transformers_shards_and_torchs_bin(name: str, tmp_path: Path) -> None:
    theirs = write_with_transformers(tmp_path / "sharded", name, max_shard_size="20kB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert_same_state(theirs, getattr(fastload, name).from_pretrained(tmp_path / "sharded"))
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "sharded" / "config.json", tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    model = getattr(fastload, name).from_pretrained(tmp_path / "bin")
    assert_same_state(theirs, model)
    assert fastload.report(model).format == "bin"
    assert fastload.report(model).mapped_share == 1.0


def test_a_model_is_whole_mapped_in_eval_mode_and_remembers_its_path(tmp_path: Path) -> None:
    write_with_transformers(tmp_path)
    model = fastload.BertModel.from_pretrained(tmp_path)
    assert not model.training
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert fastload.report(model).mapped_share == 1.0
    assert model.name_or_path == str(tmp_path)
    assert all(p.requires_grad for p in model.parameters())


def test_computed_buffers_equal_a_normally_built_models(tmp_path: Path) -> None:
    write_with_transformers(tmp_path)
    loaded = dict(fastload.BertModel.from_pretrained(tmp_path).named_buffers())
    built = dict(fastload.BertModel(fastload.BertConfig(**TINY)).named_buffers())
    assert loaded.keys() == built.keys()
    assert all(torch.equal(loaded[name], built[name]) for name in built)


def test_a_base_checkpoint_in_a_head_model_initialises_the_head_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_with_transformers(tmp_path)
    with caplog.at_level(logging.WARNING, "fastload"):
        model, info = fastload.BertForSequenceClassification.from_pretrained(
            tmp_path, num_labels=5, output_loading_info=True
        )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.shape == (5, 32)
    assert model.classifier.bias.abs().sum() == 0
    assert 0.01 < model.classifier.weight.std() < 0.03
    assert_same_state(model.bert, base)
    assert "classifier.weight" in caplog.text
    assert fastload.report(model).initialised_keys == ("classifier.weight", "classifier.bias")


def test_a_head_checkpoint_in_a_base_model_leaves_the_head_out(tmp_path: Path) -> None:
    theirs = write_with_transformers(tmp_path, "BertForMaskedLM")
    ours, info = fastload.BertModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert_same_state(theirs.bert, ours)
    assert info["missing_keys"] == set()
    assert {key.split(".")[0] for key in info["unexpected_keys"]} == {"cls"}


def test_loading_info_equals_transformers(tmp_path: Path) -> None:
    write_with_transformers(tmp_path, "BertForPreTraining")
    for name in ("BertModel", "BertForTokenClassification", "BertForMaskedLM"):
        _, theirs = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
        _, ours = getattr(fastload, name).from_pretrained(tmp_path, output_loading_info=True)
        for part in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert set(ours[part]) == set(theirs[part]), (name, part)


def test_the_decoder_stays_tied_through_a_save_and_a_load(tmp_path: Path) -> None:
    write_with_transformers(tmp_path / "a", "BertForMaskedLM")
    model = fastload.BertForMaskedLM.from_pretrained(tmp_path / "a")
    embeddings = model.get_input_embeddings()
    assert model.get_output_embeddings().weight is embeddings.weight
    model.save_pretrained(tmp_path / "b")
    stored = fastload.open_checkpoint(tmp_path / "b")
    assert "cls.predictions.decoder.weight" not in stored
    assert "bert.embeddings.word_embeddings.weight" in stored
    assert fastload.report(fastload.BertForMaskedLM.from_pretrained(tmp_path / "b")).missing_keys == ()


def test_old_names_and_old_buffers_load_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = write_with_transformers(tmp_path, "BertModel")
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in state_of(theirs).items()
    }
    state["embeddings.position_ids"] = torch.arange(40)[None]
    os.remove(tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours, info = fastload.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_state(theirs, ours)
    assert not any(info.values())
    assert caplog.text == ""
    assert fastload.report(ours).ignored_keys == ("embeddings.position_ids",)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64", torch.float32, "auto", None])
def test_dtype_means_what_it_means_in_transformers(dtype: Any, tmp_path: Path) -> None:
    write_with_transformers(tmp_path)
    theirs = transformers.BertModel.from_pretrained(tmp_path, dtype=dtype)
    ours = fastload.BertModel.from_pretrained(tmp_path, dtype=dtype)
    assert_same_state(theirs, ours)
    assert ours.dtype == theirs.dtype
    assert ours.config.dtype == theirs.config.dtype
    assert torch.get_default_dtype() == torch.float32


def test_auto_dtype_without_a_word_in_the_config_is_the_files(tmp_path: Path) -> None:
    theirs = write_with_transformers(tmp_path).half()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = fastload.BertModel.from_pretrained(tmp_path)
    assert ours.dtype == torch.float16
    assert fastload.report(ours).mapped_share == 1.0


def test_an_initialised_head_has_the_models_dtype(tmp_path: Path) -> None:
    write_with_transformers(tmp_path)
    model = fastload.BertForTokenClassification.from_pretrained(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_strict_raises_on_missing_and_unexpected_keys_in_one_error(tmp_path: Path) -> None:
    write_with_transformers(tmp_path, "BertForMaskedLM")
    with pytest.raises(KeyMatchError) as caught:
        fastload.BertForTokenClassification.from_pretrained(tmp_path, strict=True)
    assert "classifier.weight" in str(caught.value)
    assert "cls.predictions.transform.dense.weight" in str(caught.value)


def test_mismatched_sizes_are_refused_or_initialised_anew(tmp_path: Path) -> None:
    write_with_transformers(tmp_path, "BertForSequenceClassification")
    with pytest.raises(KeyMatchError, match=r"classifier\.weight: \[2, 32\] in the file, \[7, 32\] in the model"):
        fastload.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    model, info = fastload.BertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.classifier.weight.shape == (7, 32)
    assert {name for name, _, _ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}


def test_key_mapping_renames_the_files_keys(tmp_path: Path) -> None:
    theirs = write_with_transformers(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    torch.save({f"student.{key}": tensor for key, tensor in state_of(theirs).items()}, tmp_path / "pytorch_model.bin")
    ours = fastload.BertModel.from_pretrained(tmp_path, key_mapping={r"^student\.": ""}, strict=True)
    assert_same_state(theirs, ours)


def test_an_unknown_keyword_is_a_type_error_that_names_it(tmp_path: Path) -> None:
    write_with_transformers(tmp_path)
    with pytest.raises(TypeError, match="hiden_size"):
        fastload.BertModel.from_pretrained(tmp_path, hiden_size=3)
    with pytest.raises(TypeError, match="dtyp"):
        fastload.AutoModel.from_pretrained(tmp_path, dtyp="auto")


def test_a_variant_and_a_subfolder_are_found(tmp_path: Path) -> None:
    theirs = write_with_transformers(tmp_path / "deep", variant="fp16")
    ours = fastload.BertModel.from_pretrained(tmp_path, subfolder="deep", variant="fp16")
    assert_same_state(theirs, ours)
    with pytest.raises(CheckpointNotFoundError, match="fp16"):
        fastload.BertModel.from_pretrained(tmp_path, subfolder="deep")


def test_use_safetensors_chooses_the_format(tmp_path: Path) -> None:
    theirs = write_with_transformers(tmp_path)
    other = {key: torch.zeros_like(tensor) for key, tensor in state_of(theirs).items()}
    torch.save(other, tmp_path / "pytorch_model.bin")
    assert_same_state(fastload.BertModel.from_pretrained(tmp_path), theirs)
    from_bin = fastload.BertModel.from_pretrained(tmp_path, use_safetensors=False)
    assert all(tensor.abs().sum() == 0 for tensor in state_of(from_bin).values())
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError):
        fastload.BertModel.from_pretrained(tmp_path, use_safetensors=True)


def test_the_auto_class_finds_the_architecture(tmp_path: Path) -> None:
    theirs = write_with_transformers(tmp_path, "BertForMaskedLM")
    assert type(fastload.AutoModel.from_pretrained(tmp_path)) is fastload.BertModel
    model = fastload.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(model) is fastload.BertForMaskedLM
    assert_same_state(theirs, model)


def test_a_config_of_another_family_is_refused_by_a_concrete_class(tmp_path: Path) -> None:
    write_with_transformers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="llama"):
        fastload.BertModel.from_pretrained(tmp_path)


def test_a_config_given_by_the_caller_is_used_and_not_changed(tmp_path: Path) -> None:
    write_with_transformers(tmp_path)
    config = fastload.BertConfig(**TINY)
    model = fastload.BertModel.from_pretrained(tmp_path, config=config, hidden_dropout_prob=0.5, dtype="bfloat16")
    assert model.config.hidden_dropout_prob == 0.5
    assert config.hidden_dropout_prob == 0.1
    assert config.dtype is None


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu"), "sequential"])
def test_device_maps_of_a_machine_with_one_device(device_map: Any, tmp_path: Path) -> None:
    theirs = write_with_transformers(tmp_path)
    ours = fastload.BertModel.from_pretrained(tmp_path, device_map=device_map)
    assert ours.hf_device_map == {"": "cpu"}
    assert_same_state(theirs, ours)


def test_what_exceeds_max_memory_is_mapped_from_disk(tmp_path: Path, inputs: Any) -> None:
    theirs = write_with_transformers(tmp_path)
    ours = fastload.BertModel.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "100kB"})
    assert set(ours.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(ours(**inputs).to_tuple(), theirs(**inputs).to_tuple(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ["cuda:99", "warp", {"": "warp"}])
def test_a_device_that_is_not_there_is_refused(device: Any, tmp_path: Path) -> None:
    write_with_transformers(tmp_path)
    with pytest.raises(OptionError, match=r"cuda:99|warp"):
        fastload.BertModel.from_pretrained(tmp_path, device_map=device)


def test_two_checkpoints_of_one_format_are_refused_and_one_can_be_chosen(tmp_path: Path) -> None:
    write_with_transformers(tmp_path, max_shard_size="20kB")
    single = write_with_transformers(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    with pytest.raises(AmbiguousCheckpointError, match=r"model\.safetensors"):
        fastload.BertModel.from_pretrained(tmp_path)
    assert len(fastload.load_state_dict(tmp_path / "model.safetensors")) == len(single.state_dict())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_with_transformers(tmp_path, max_shard_size="20kB")
    shard = sorted(tmp_path.glob("model-00002-*"))[0]
    shard.unlink()
    with pytest.raises((CheckpointNotFoundError, IndexFileError), match=shard.name):
        fastload.BertModel.from_pretrained(tmp_path)


def test_saving_over_the_folder_the_model_is_mapped_from(tmp_path: Path) -> None:
    write_with_transformers(tmp_path)
    model = fastload.BertModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.pooler.dense.bias.add_(1)
    expected = {name: tensor.clone() for name, tensor in state_of(model).items()}
    model.save_pretrained(tmp_path)
    again = state_of(fastload.BertModel.from_pretrained(tmp_path))
    assert all(same_bytes(again[name], tensor) for name, tensor in expected.items())
    assert all(same_bytes(state_of(model)[name], tensor) for name, tensor in expected.items())


def test_a_sharded_save_leaves_no_older_weights_behind(tmp_path: Path) -> None:
    write_with_transformers(tmp_path)
    model = fastload.BertModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert not (tmp_path / "model.safetensors").exists()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_eight_threads_load_the_same_model(tmp_path: Path) -> None:
    theirs = write_with_transformers(tmp_path)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                assert_same_state(theirs, fastload.AutoModel.from_pretrained(tmp_path))
        except BaseException as error:  # noqa: BLE001 - a thread's failure must reach the test
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
