"""save_pretrained: what is in the files is what transformers writes, and what was asked for is done."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from torch import nn

from fastload import hf
from fastload.errors import OptionError, SaveError
from fastload.hf.collecting import collect
from fastload.hf.saving import save_pretrained
from tests.conftest import same_bytes
from tests.hf.saved import (
    MODELS,
    SIZES,
    assert_same_checkpoint,
    assert_same_model,
    assert_same_tensors,
    contents,
    made,
    weights,
)


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    hf.reset_stats()
    yield
    hf.reset_stats()


def save_both_ways(model: Any, folder: Path, **options: Any) -> tuple[Path, Path]:
    """Saves by fastload and by transformers; the folders."""
    ours, stock = folder / "fastload", folder / "transformers"
    save_pretrained(model, ours, **options)
    type(model).save_pretrained(model, stock, **options)
    assert hf.stats().fast_saves == 1
    return ours, stock


# The files.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_shard_size": "20KB"},
        {"max_shard_size": "5KB"},
        {"max_shard_size": 30_000, "save_original_format": False},
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "40KB"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_transformers(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    assert_same_checkpoint(*save_both_ways(made(name), tmp_path, **options))


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("name", MODELS)
def test_files_of_a_loaded_model_are_those_of_transformers(tmp_path: Path, name: str, max_shard_size: str) -> None:
    model = made(name, torch.bfloat16)
    model.save_pretrained(tmp_path / "first")
    with hf.enabled():
        loaded = type(model).from_pretrained(tmp_path / "first")
    ours, stock = save_both_ways(loaded, tmp_path, max_shard_size=max_shard_size)
    assert_same_checkpoint(ours, stock)
    assert_same_tensors(weights(ours), weights(tmp_path / "first"))


def test_tensors_without_elements_are_divided_as_transformers_does(tmp_path: Path) -> None:
    model = made("bert")
    for layer in model.bert.encoder.layer:
        layer.register_buffer("first", torch.empty(0, 3))
        layer.register_buffer("second", torch.empty(0))
    ours, stock = save_both_ways(model, tmp_path, max_shard_size="20KB")
    assert_same_checkpoint(ours, stock)


def test_prefix_that_a_load_removed_is_put_back(tmp_path: Path) -> None:
    made("bert").save_pretrained(tmp_path / "first")
    base = transformers.BertModel.from_pretrained(tmp_path / "first", add_pooling_layer=False)
    assert_same_checkpoint(*save_both_ways(base, tmp_path))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_transformers_loads_what_was_saved(tmp_path: Path, name: str, safe: bool) -> None:
    model = made(name)
    save_pretrained(model, tmp_path / "fastload", safe_serialization=safe, max_shard_size="50KB")
    model.save_pretrained(tmp_path / "transformers")
    again, info = type(model).from_pretrained(tmp_path / "fastload", output_loading_info=True)
    assert not any(info.values())
    assert_same_model(again, type(model).from_pretrained(tmp_path / "transformers"))


def test_experts_are_written_without_a_second_copy_of_them() -> None:
    model = made("moe")
    memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = collect(model, model.state_dict(), original_format=True, max_shard_bytes=10**9)
    assert len(found.tensors) > len(model.state_dict())
    assert {tensor.untyped_storage().data_ptr() for tensor in found.tensors.values()} == memory


def test_generation_config_that_transformers_refuses_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = made("t5")
    model.generation_config.update(do_sample=False, temperature=0.5)
    with pytest.raises(ValueError, match="temperature"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_code_of_a_custom_model_travels_with_it(tmp_path: Path) -> None:
    source = tmp_path / "modeling_own.py"
    source.write_bytes(b"import transformers\n\nclass OwnBert(transformers.BertModel):\n    pass  # caf\xc3\xa9\n")
    spec = importlib.util.spec_from_file_location("modeling_own", source)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["modeling_own"] = module
    try:
        spec.loader.exec_module(module)
        module.OwnBert.register_for_auto_class("AutoModel")
        model = module.OwnBert(transformers.BertConfig(**SIZES))
        ours, stock = save_both_ways(model, tmp_path)
    finally:
        del sys.modules["modeling_own"]
    assert_same_checkpoint(ours, stock)
    assert (ours / "modeling_own.py").read_bytes() == source.read_bytes()
    assert json.loads((ours / "config.json").read_text())["auto_map"] == {"AutoModel": "modeling_own.OwnBert"}
    again = transformers.AutoModel.from_pretrained(ours, trust_remote_code=True)
    assert_same_tensors(again.state_dict(), model.state_dict())


# What is asked.


def test_state_dict_of_the_caller_is_saved_and_left_as_it_is(tmp_path: Path) -> None:
    model = made("t5")
    state_dict = {key: tensor + 1 for key, tensor in model.state_dict().items() if "encoder" in key}
    before = dict(state_dict)
    save_pretrained(model, tmp_path / "fastload", state_dict=state_dict)
    assert state_dict == before
    model.save_pretrained(tmp_path / "transformers", state_dict=state_dict)
    assert_same_checkpoint(tmp_path / "fastload", tmp_path / "transformers")


def test_keys_that_a_class_does_not_save_are_left_out(tmp_path: Path) -> None:
    model = made("bert")
    model._keys_to_ignore_on_save = ["bert.encoder.layer.0.output.dense.bias"]
    ours, stock = save_both_ways(model, tmp_path)
    assert_same_checkpoint(ours, stock)
    assert "bert.encoder.layer.0.output.dense.bias" not in weights(ours)


def test_another_than_the_main_process_writes_nothing(tmp_path: Path) -> None:
    model = made("bert")
    assert save_pretrained(model, tmp_path / "new", is_main_process=False) is None
    assert os.listdir(tmp_path / "new") == []
    assert model.config.architectures == ["BertForMaskedLM"]
    assert hf.stats().fast_saves == hf.stats().handed_over_saves == 0


def test_options_may_be_given_in_the_order_of_transformers(tmp_path: Path) -> None:
    model = made("bert")
    arguments = (True, None, False, "20KB", "fp16")
    save_pretrained(model, tmp_path / "fastload", *arguments)
    model.save_pretrained(tmp_path / "transformers", *arguments)
    assert_same_checkpoint(tmp_path / "fastload", tmp_path / "transformers")


@pytest.mark.parametrize("options", [{"max_shard_size": "a lot"}, {"variant": "../up"}], ids=str)
def test_option_that_cannot_be_meant_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        save_pretrained(made("bert"), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match="this is a file"):
        save_pretrained(made("bert"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_model_without_values_is_refused_by_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = made("moe")
    with pytest.raises(SaveError, match="meta device") as caught:
        save_pretrained(model, tmp_path / "new")
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in str(caught.value.found)
    assert not (tmp_path / "new").exists()


def test_what_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    state_dict = {**made("bert").state_dict(), "extra": "text"}
    with pytest.raises(OptionError, match="'extra' is no tensor but str"):
        save_pretrained(made("bert"), tmp_path / "new", state_dict=state_dict)


# Where the tensors are.


def test_parameters_that_are_not_contiguous_are_saved_by_value(tmp_path: Path) -> None:
    model = made("moe")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)
    assert not model.lm_head.weight.is_contiguous()
    assert_same_checkpoint(*save_both_ways(model, tmp_path))


def test_parameters_that_are_parts_of_one_memory_are_saved_by_value(tmp_path: Path) -> None:
    model = made("bert")
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    ours, stock = save_both_ways(model, tmp_path)
    assert_same_checkpoint(ours, stock)


def on_disk(model: Any, folder: Path) -> Any:
    """The model, loaded again with one of its layers on disk."""
    model.save_pretrained(folder / "first")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {"device_map": device_map, "offload_folder": folder / "offload"}
    loaded = type(model).from_pretrained(folder / "first", **options)
    assert loaded.model.layers[1].self_attn.q_proj.weight.is_meta
    return loaded


@pytest.mark.parametrize("name", ["moe", "mixtral"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_model_that_lies_on_disk_is_saved_with_its_values(
    tmp_path: Path, name: str, safe: bool, max_shard_size: str
) -> None:
    model = on_disk(made(name), tmp_path)
    save_pretrained(model, tmp_path / "fastload", safe_serialization=safe, max_shard_size=max_shard_size)
    assert_same_tensors(weights(tmp_path / "fastload"), weights(tmp_path / "first"))
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    if safe:
        model.save_pretrained(tmp_path / "transformers", max_shard_size=max_shard_size)
        assert_same_checkpoint(tmp_path / "fastload", tmp_path / "transformers")


def test_model_on_disk_is_loaded_tensor_by_tensor(tmp_path: Path) -> None:
    model = on_disk(made("moe"), tmp_path)
    found = collect(model, model.state_dict(), original_format=True, max_shard_bytes=10**9)
    late = {key for key, tensor in found.tensors.items() if tensor.is_meta}
    assert late == found.offloaded.keys()
    # Experts are cut from the fused parameter, which has to be there for that.
    expected = {key for key in found.tensors if key.startswith("model.layers.1.") and ".experts." not in key}
    assert late == expected
    first = weights(tmp_path / "first")
    assert all(same_bytes(found.offloaded[key](), first[key]) for key in late)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", ["bert", "moe"])
def test_model_that_accelerate_offloaded_is_saved_with_its_values(tmp_path: Path, name: str, where: str) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "first")
    if where == "memory":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    save_pretrained(model, tmp_path / "fastload")
    found, expected = weights(tmp_path / "fastload"), weights(tmp_path / "first")
    assert expected.keys() <= found.keys()
    assert_same_tensors({key: found[key] for key in expected}, expected)
    ours, stock = (type(model).from_pretrained(tmp_path / folder) for folder in ("fastload", "first"))
    assert_same_model(ours, stock)


# Who saves.


class Own(transformers.BertModel):
    """A class that writes a file of its own."""

    n_calls = 0

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        self.n_calls += 1
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, "own.txt").write_text("mine")


def test_class_that_saves_more_does_so_and_its_weights_are_saved_by_fastload(tmp_path: Path) -> None:
    model = Own(transformers.BertConfig(**SIZES))
    save_pretrained(model, tmp_path, variant="fp16", safe_serialization=False)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "own.txt", "pytorch_model.fp16.bin"]
    assert hf.stats().fast_saves == 1
    assert model.n_calls == 1


def test_call_in_the_place_of_the_method_does_what_the_method_does_and_no_more(tmp_path: Path) -> None:
    model = Own(transformers.BertConfig(**SIZES))
    save_pretrained(model, tmp_path, stock=transformers.PreTrainedModel.save_pretrained)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert model.n_calls == 0


@pytest.mark.parametrize("is_on", [False, True], ids=["off", "on"])
def test_what_only_transformers_knows_is_handed_over_and_counted(tmp_path: Path, is_on: bool) -> None:
    model = made("bert")
    if is_on:
        hf.enable()
    try:
        with pytest.raises(ValueError, match="distributed_checkpoint=True"):
            save_pretrained(model, tmp_path, distributed_checkpoint=True)
    finally:
        hf.disable()
    assert hf.stats().reasons == {"a distributed checkpoint": 1}


def test_switch_saves_by_fastload_what_is_saved_through_transformers(tmp_path: Path) -> None:
    model = made("moe")
    with hf.enabled():
        model.save_pretrained(tmp_path / "fastload", max_shard_size="20KB", safe_serialization=False)
    assert hf.stats().fast_saves == 1
    assert "pytorch_model.bin.index.json" in contents(tmp_path / "fastload")
    model.save_pretrained(tmp_path / "transformers")
    assert hf.stats().fast_saves == 1
    assert_same_tensors(weights(tmp_path / "fastload"), weights(tmp_path / "transformers"))
