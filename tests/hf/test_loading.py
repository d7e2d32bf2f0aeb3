"""What a caller can ask of from_pretrained, and the forms in which weights come: the same with fastload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastload
from fastload import hf
from fastload.errors import IncompleteModelError, IndexFileError, KeyMatchError, TruncatedFileError
from fastload.hf.loading import loading_class
from tests.hf.families import build
from tests.hf.sides import assert_same_load, assert_same_models, assert_same_outcome
from tests.sources.hub_server import HubServer

Written = Callable[..., Path]
Llama = transformers.LlamaForCausalLM
Bert = transformers.BertForMaskedLM


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"dtype": "bfloat16", "device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": torch.device("cpu")},
        {"use_safetensors": True},
        {"disable_mmap": True},
        {"disable_mmap": True, "dtype": "bfloat16"},
        {"attn_implementation": "eager"},
        {"output_attentions": True, "num_labels": 7},
        {"low_cpu_mem_usage": True},
        {"key_mapping": {r"^model\.layers": "model.layers"}},
        {"ignore_mismatched_sizes": True, "vocab_size": 50},
        {"vocab_size": 50},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_an_option_does_what_it_does_in_transformers(written: Written, family: str, options: dict[str, Any]) -> None:
    assert_same_outcome(
        getattr(transformers, {"llama": "Llama", "qwen3_moe": "Qwen3Moe"}[family] + "ForCausalLM"),
        written(family),
        **options,
    )


def test_keys_are_mapped_as_asked(written: Written, tmp_path: Path) -> None:
    tensors = load_file(written("llama") / "model.safetensors")
    copied(written("llama"), tmp_path)
    save_file({f"old.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert_same_load(Llama, tmp_path)
    mapped = assert_same_load(Llama, tmp_path, key_mapping={r"^old\.": ""})
    assert mapped.info["missing_keys"] == "[]"


def test_a_head_of_another_size_is_an_error_unless_it_is_to_be_ignored(written: Written) -> None:
    vit = transformers.ViTForImageClassification
    failed = assert_same_outcome(vit, written("vit"), num_labels=5)
    assert "classifier.weight" in failed.error or "ignore_mismatched_sizes" in failed.error
    loaded = assert_same_load(vit, written("vit"), num_labels=5, ignore_mismatched_sizes=True)
    assert "classifier.weight" in loaded.info["mismatched_keys"]


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_a_variant_in_a_subfolder(written: Written, tmp_path: Path, options: dict[str, Any]) -> None:
    build("llama").half().save_pretrained(tmp_path / "below", variant="fp16", **options)
    assert_same_load(Llama, tmp_path, subfolder="below", variant="fp16")
    assert_same_outcome(Llama, tmp_path / "below")
    assert_same_outcome(Llama, tmp_path, variant="fp16")


def test_a_revision_of_a_hub(hub: HubServer, written: Written, tmp_path: Path) -> None:
    old = hub.push("org/tiny", written("llama"))
    build("llama", seed=1).save_pretrained(tmp_path / "new", max_shard_size="20KB")
    hub.push("org/tiny", tmp_path / "new")
    for revision in ("main", old):
        assert_same_load(Llama, "org/tiny", revision=revision, cache_dir=tmp_path / "cache")
    assert_same_load(Llama, "org/tiny", revision=old, cache_dir=tmp_path / "cache", local_files_only=True)
    with hf.enabled(), pytest.raises(OSError, match="nowhere"):
        Llama.from_pretrained("org/nowhere", cache_dir=tmp_path / "cache")


def test_one_bin_file(written: Written, tmp_path: Path) -> None:
    pickled(written("llama"), tmp_path)
    assert_same_load(Llama, tmp_path)
    assert_same_load(Llama, tmp_path, dtype="bfloat16", use_safetensors=False)
    assert_same_outcome(Llama, tmp_path, use_safetensors=True)


def test_a_bin_file_of_the_older_form(written: Written, tmp_path: Path) -> None:
    pickled(written("llama"), tmp_path, _use_new_zipfile_serialization=False)
    assert_same_load(Llama, tmp_path)


def test_a_bin_file_of_a_whole_state_dict_with_its_ties(tmp_path: Path) -> None:
    for family in ("bert", "t5"):
        model = build(family)
        model.config.save_pretrained(tmp_path / family)
        torch.save(model.state_dict(), tmp_path / family / "pytorch_model.bin")
        assert_same_load(type(model), tmp_path / family)


def test_tensors_of_a_bin_file_keep_their_strides(written: Written, tmp_path: Path) -> None:
    copied(written("qwen3_moe"), tmp_path)
    tensors = load_file(written("qwen3_moe") / "model.safetensors")
    turned = {key: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor for key, tensor in tensors.items()}
    torch.save(turned, tmp_path / "pytorch_model.bin")
    for dtype in ("auto", "bfloat16"):
        assert_same_load(transformers.Qwen3MoeForCausalLM, tmp_path, dtype=dtype)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_bin_files_with_an_index(written: Written, tmp_path: Path, family: str) -> None:
    folder, tensors = written(family), load_file(written(family) / "model.safetensors")
    copied(folder, tmp_path)
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number, (key, tensor) in enumerate(tensors.items()):
        shards[number % 3][key] = tensor
    names = [f"pytorch_model-0000{number}-of-00003.bin" for number in (1, 2, 3)]
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, tmp_path / name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).__class__
    assert_same_load(model, tmp_path)
    assert_same_load(model, tmp_path, dtype="float16")


def test_tensors_that_the_caller_has(written: Written) -> None:
    config = transformers.AutoConfig.from_pretrained(written("qwen3_moe"))
    given = load_file(written("qwen3_moe") / "model.safetensors")
    assert_same_load(transformers.Qwen3MoeForCausalLM, None, config=config, state_dict=given)
    loaded = assert_same_load(transformers.Qwen3MoeForCausalLM, None, config=config, state_dict=given, dtype="float16")
    assert loaded.info["missing_keys"] == "[]"
    # A path and tensors at once are refused.
    assert_same_outcome(transformers.Qwen3MoeForCausalLM, written("qwen3_moe"), state_dict=given)


def test_tensors_that_the_caller_has_are_shared_and_not_copied(written: Written) -> None:
    config = transformers.AutoConfig.from_pretrained(written("llama"))
    given = load_file(written("llama") / "model.safetensors")
    stock = Llama.from_pretrained(None, config=config, state_dict=given)
    with hf.enabled():
        loaded = Llama.from_pretrained(None, config=config, state_dict=given)
    address = given["lm_head.weight"].data_ptr()
    assert stock.lm_head.weight.data_ptr() == loaded.lm_head.weight.data_ptr() == address


def test_entries_of_the_caller_that_are_no_tensors(written: Written) -> None:
    config = transformers.AutoConfig.from_pretrained(written("llama"))
    given = load_file(written("llama") / "model.safetensors")
    loaded = assert_same_load(Llama, None, config=config, state_dict={**given, "epoch": 3, "more": torch.ones(1)})
    assert loaded.info["unexpected_keys"] == repr(["'epoch'", "'more'"])


def test_entries_of_a_bin_file_that_are_no_tensors(written: Written, tmp_path: Path) -> None:
    given = load_file(written("llama") / "model.safetensors")
    (tmp_path / "config.json").write_bytes((written("llama") / "config.json").read_bytes())
    torch.save({**given, "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert assert_same_load(Llama, tmp_path).info["unexpected_keys"] == repr(["'epoch'"])


def test_tensors_of_the_caller_without_values_are_refused(written: Written) -> None:
    config = transformers.AutoConfig.from_pretrained(written("llama"))
    given = {key: tensor.to("meta") for key, tensor in build("llama").state_dict().items()}
    for load in (Llama.from_pretrained, loading_class(Llama).from_pretrained):
        with pytest.raises((NotImplementedError, IncompleteModelError)):
            load(None, config=config, state_dict=given)


def test_no_weights_at_all(tmp_path: Path) -> None:
    build("llama").config.save_pretrained(tmp_path)
    failed = assert_same_outcome(Llama, tmp_path)
    assert failed.error.startswith("OSError")
    assert_same_outcome(Llama, tmp_path / "nowhere")


def test_a_config_of_the_callers_own_is_left_alone(written: Written) -> None:
    config = transformers.AutoConfig.from_pretrained(written("llama"))
    config.num_hidden_layers = 1
    before = config.to_dict()
    assert_same_load(Llama, written("llama"), config=config)
    assert config.to_dict() == before


def test_settings_of_generation_come_along(written: Written, tmp_path: Path) -> None:
    copied(written("gpt2"), tmp_path, weights=True)
    transformers.GenerationConfig(max_new_tokens=3, do_sample=True, top_k=7).save_pretrained(tmp_path)
    loaded = assert_same_load(transformers.GPT2LMHeadModel, tmp_path)
    assert loaded.model is not None
    assert loaded.model.generation_config.top_k == 7


def test_arguments_of_a_constructor_are_passed_on(written: Written) -> None:
    class Scaled(transformers.BertModel):
        def __init__(self, config: Any, scale: float, add_pooling_layer: bool = True) -> None:
            super().__init__(config, add_pooling_layer=add_pooling_layer)
            self.scale = scale

    stock = Scaled.from_pretrained(written("bert"), 3.0, add_pooling_layer=False)
    with hf.enabled():
        loaded = Scaled.from_pretrained(written("bert"), 3.0, add_pooling_layer=False)
    assert loaded.scale == 3.0
    assert loaded.pooler is None
    assert_same_models(stock, loaded)


def test_a_class_with_a_from_pretrained_of_its_own_keeps_it(written: Written) -> None:
    class Labelled(transformers.BertForMaskedLM):
        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, label: str = "none", **kwargs: Any) -> Any:
            model = super().from_pretrained(path, *args, **kwargs)
            model.label = label
            return model

    stock = Labelled.from_pretrained(written("bert"), label="mine")
    hf.reset_stats()
    with hf.enabled():
        loaded = Labelled.from_pretrained(written("bert"), label="mine")
    assert hf.stats().fast_loads == 1
    assert loaded.label == "mine"
    assert_same_models(stock, loaded)


def test_a_class_that_takes_part_in_loading_is_asked(written: Written) -> None:
    asked: list[str] = []

    class Watching(transformers.BertForMaskedLM):
        @staticmethod
        def _load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
            asked.append("load")
            return transformers.BertForMaskedLM._load_pretrained_model(*args, **kwargs)

        @staticmethod
        def _finalize_model_loading(*args: Any, **kwargs: Any) -> Any:
            asked.append("finish")
            return transformers.BertForMaskedLM._finalize_model_loading(*args, **kwargs)

    expected = Watching.from_pretrained(written("bert"))
    with hf.enabled():
        found = Watching.from_pretrained(written("bert"))
    assert asked == ["load", "finish", "load", "finish"]
    assert_same_models(expected, found)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.device("cpu")], ids=str)
def test_what_the_caller_has_switched_on_counts(written: Written, around: Callable[[], Any]) -> None:
    with around():
        stock = Bert.from_pretrained(written("bert"))
        with hf.enabled():
            loaded = Bert.from_pretrained(written("bert"))
    assert_same_models(stock, loaded)
    assert [p.is_inference() for p in loaded.parameters()] == [p.is_inference() for p in stock.parameters()]


def test_a_load_on_meta_is_refused_as_by_transformers(written: Written) -> None:
    with torch.device("meta"):
        failed = assert_same_outcome(Bert, written("bert"))
    assert failed.error.startswith("RuntimeError")


def test_a_default_type_counts_where_the_files_say_none(written: Written, tmp_path: Path) -> None:
    copied(written("bert"), tmp_path, weights=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_load(Bert, tmp_path)
        assert_same_load(Bert, tmp_path, dtype=None)
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_are_mapped_and_the_report_says_so(written: Written) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(written("llama"))
    report = fastload.report(model)
    assert set(report.bytes_by_action) == {"map"}
    assert report.n_bytes == sum(p.nbytes for p in model.parameters())
    assert [Path(file).name for file in report.files] == ["model.safetensors"]
    assert mappings_of(written("llama")) > 0


def test_without_mapping_the_files_may_be_rewritten(written: Written, tmp_path: Path) -> None:
    copied(written("llama"), tmp_path, weights=True)
    with hf.enabled():
        model = Llama.from_pretrained(tmp_path, disable_mmap=True)
    assert mappings_of(tmp_path) == 0
    (tmp_path / "model.safetensors").write_bytes(b"")
    expected = load_file(written("llama") / "model.safetensors")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_training_a_loaded_model_leaves_its_files_alone(written: Written, tmp_path: Path) -> None:
    copied(written("bert"), tmp_path, weights=True)
    before = (tmp_path / "model.safetensors").read_bytes()
    with hf.enabled():
        model = Bert.from_pretrained(tmp_path)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(6)[None]
    first = model(input_ids=tokens, labels=tokens).loss
    first.backward()
    optimiser.step()
    assert model(input_ids=tokens, labels=tokens).loss < first
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_strict_names_the_keys_that_do_not_fit(written: Written) -> None:
    folder = written("llama", "LlamaModel")
    stock = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert stock.lm_head.weight.isfinite().all()  # transformers makes random values, and logs it
    with pytest.raises(KeyMatchError, match=r"missing in the files: lm_head\.weight") as raised:
        hf.AutoModelForCausalLM.from_pretrained(folder, strict=True)
    assert raised.value.file == str(folder)
    with hf.enabled(), pytest.raises(KeyMatchError, match=r"not in the model: .*lm_head"):
        transformers.LlamaModel.from_pretrained(written("llama"), strict=True)
    with pytest.raises(KeyMatchError, match=r"shape of classifier\.weight: \[2, 32\] in the files, \[5, 32\]"):
        hf.AutoModelForImageClassification.from_pretrained(
            written("vit"), num_labels=5, ignore_mismatched_sizes=True, strict=True
        )
    whole = hf.AutoModelForCausalLM.from_pretrained(written("llama"), strict=True)
    assert_same_models(transformers.AutoModelForCausalLM.from_pretrained(written("llama")), whole)


def test_an_index_that_leaves_its_folder_is_refused(written: Written, tmp_path: Path) -> None:
    shutil.copytree(written("llama", max_shard_size="20KB"), tmp_path / "model")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    index_file = tmp_path / "model" / "model.safetensors.index.json"
    index_file.write_text(index_file.read_text().replace(shard.name, "../elsewhere.safetensors"))
    Llama.from_pretrained(tmp_path / "model")  # transformers reads whatever file an index names
    with hf.enabled(), pytest.raises(IndexFileError, match=r"\.\./elsewhere\.safetensors"):
        Llama.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("damage", ["names a key that its shard lacks", "lacks a key", "names another shard"])
def test_an_index_that_is_not_right(written: Written, tmp_path: Path, damage: str) -> None:
    shutil.copytree(written("llama", max_shard_size="20KB"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    key, *_ = owners = index["weight_map"]
    if damage.startswith("names a key"):
        owners["model.nowhere.weight"] = owners[key]
    elif damage == "lacks a key":
        del owners[key]
    else:
        owners[key] = next(name for name in owners.values() if name != owners[key])
    file.write_text(json.dumps(index))
    assert_same_load(Llama, tmp_path)


def test_files_that_are_lost_or_cut_short_are_errors(written: Written, tmp_path: Path) -> None:
    shutil.copytree(written("llama", max_shard_size="20KB"), tmp_path, dirs_exist_ok=True)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with hf.enabled(), pytest.raises(TruncatedFileError, match=shard.name):
        Llama.from_pretrained(tmp_path)
    shard.unlink()
    for load in (Llama.from_pretrained, loading_class(Llama).from_pretrained):
        with pytest.raises(FileNotFoundError, match=shard.name):
            load(tmp_path)


def test_a_name_of_the_weights_that_the_config_gives(written: Written, tmp_path: Path) -> None:
    copied(written("llama"), tmp_path, weights=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "mine.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "transformers_weights": "mine.safetensors"}))
    assert_same_load(Llama, tmp_path)


def copied(folder: Path, target: Path, weights: bool = False) -> None:
    """A checkpoint's settings, and its weights if these are wanted too."""
    left_out = shutil.ignore_patterns() if weights else shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(folder, target, ignore=left_out, dirs_exist_ok=True)


def pickled(folder: Path, target: Path, **options: Any) -> None:
    """The checkpoint with its weights as pytorch_model.bin."""
    copied(folder, target)
    torch.save(load_file(folder / "model.safetensors"), target / "pytorch_model.bin", **options)


def mappings_of(folder: Path) -> int:
    with open("/proc/self/maps") as maps:
        return sum(str(folder) in line for line in maps)
