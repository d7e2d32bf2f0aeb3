"""Offload to disk: models that compute what they would, from the original files, and with nothing written."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter

from fastload import hf
from fastload.errors import TruncatedFileError
from fastload.storage.memory import private_bytes
from tests.conftest import same_bytes
from tests.hf.families import build, model_class, randomised
from tests.hf.offloaded import assert_same_offload, load, logits, on_meta
from tests.hf.saved import assert_same_tensors, weights
from tests.hf.sides import assert_same_load, assert_same_models

Written = Callable[..., Path]
Llama = transformers.LlamaForCausalLM
Moe = transformers.Qwen3MoeForCausalLM
Bert = transformers.BertForMaskedLM

ALL = {"": "disk"}
# Sides of a map, for models of two layers: the last parts on disk, and all but these.
LAST = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
LAST |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
FIRST = {name: "disk" if device == "cpu" else "cpu" for name, device in LAST.items()}


# The same as in transformers.


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral", "deepseek_v3", "bert", "gpt2", "t5"])
def test_a_family_all_on_disk(written: Written, tmp_path: Path, family: str, dtype: str) -> None:
    loaded = assert_same_offload(model_class(family), written(family), tmp_path / "o", device_map=ALL, dtype=dtype)
    assert all(parameter.is_meta for parameter in loaded.parameters())
    assert loaded.hf_device_map == ALL


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("device_map", [LAST, FIRST], ids=["last", "first"])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", [Llama, Moe])
def test_a_part_on_disk(
    written: Written, tmp_path: Path, kind: Any, shard_size: str, device_map: dict[str, str], dtype: str
) -> None:
    folder = written(kind.config_class.model_type, max_shard_size=shard_size)
    loaded = assert_same_offload(kind, folder, tmp_path / "o", device_map=device_map, dtype=dtype)
    of_map = {name for name, device in device_map.items() if device == "disk"}
    expected = {name for name in loaded.state_dict() if any(name.startswith(f"{part}.") for part in of_map)}
    assert on_meta(loaded) == expected


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "t5"])
def test_what_does_not_fit_into_the_memory_allowed_is_on_disk(
    written: Written, tmp_path: Path, family: str, device_map: str
) -> None:
    n_bytes = sum(tensor.nbytes for tensor in build(family).state_dict().values())
    options = {"device_map": device_map, "max_memory": {"cpu": n_bytes * 6 // 10}}
    loaded = assert_same_offload(model_class(family), written(family), tmp_path / "o", **options)
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert 0 < len(on_meta(loaded)) < len(loaded.state_dict())


@pytest.mark.parametrize("kind", [Llama, Moe])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_bin_files(written: Written, tmp_path: Path, kind: Any, dtype: str) -> None:
    family = kind.config_class.model_type
    hf.save_pretrained(build(family), tmp_path / "bin", safe_serialization=False, max_shard_size="50KB")
    assert (tmp_path / "bin" / "pytorch_model.bin.index.json").exists()
    assert_same_offload(kind, tmp_path / "bin", tmp_path / "o", device_map=LAST, dtype=dtype)


def test_tensors_that_the_caller_has(written: Written, tmp_path: Path) -> None:
    for kind in (Llama, Moe):
        folder = written(kind.config_class.model_type)
        config = transformers.AutoConfig.from_pretrained(folder)
        given = load_file(folder / "model.safetensors")
        for dtype in ("float32", "float16"):
            options = {"config": config, "state_dict": given, "device_map": LAST, "dtype": dtype}
            assert_same_offload(kind, None, tmp_path / "o", **options)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_buffers(tmp_path: Path, offload_buffers: bool, train: bool) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    kind = transformers.ResNetForImageClassification
    randomised(kind(config)).save_pretrained(tmp_path / "model")
    options = {"device_map": ALL, "offload_buffers": offload_buffers}
    with torch.random.fork_rng():
        pixels = torch.rand(2, 3, 32, 32)
    stock = kind.from_pretrained(tmp_path / "model", offload_folder=tmp_path / "o", **options).train(train)
    loaded = load(kind, tmp_path / "model", **options).train(train)
    for _ in range(3):
        with torch.no_grad():
            assert same_bytes(loaded(pixels).logits, stock(pixels).logits)
        assert_same_models(stock, loaded)
    mean = "resnet.embedder.embedder.normalization.running_mean"
    assert (mean in on_meta(loaded)) == offload_buffers


class Recurrent(transformers.PreTrainedModel):
    """A model with a module that keeps a list of its parameters."""

    config_class = transformers.BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lstm = nn.LSTM(8, 8, num_layers=2)
        self.head = nn.Linear(8, 3)
        self.post_init()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.lstm(values)[0])
        return found


@pytest.mark.parametrize("device_map", [ALL, {"lstm": "disk", "head": "cpu"}], ids=["all", "part"])
def test_recurrent_modules(tmp_path: Path, device_map: dict[str, str]) -> None:
    model = randomised(Recurrent(transformers.BertConfig()))
    model.save_pretrained(tmp_path / "model")
    loaded = assert_same_load(
        Recurrent, tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    ).model
    assert loaded is not None
    values = torch.ones(4, 2, 8)
    for _ in range(2):
        assert same_bytes(loaded(values), model(values))


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {}], ids=["shards", "one file"])
def test_saving_goes_through_the_hooks(written: Written, tmp_path: Path, options: dict[str, Any]) -> None:
    for kind in (Llama, Moe, Bert):
        folder = written(kind.config_class.model_type)
        loaded = load(kind, folder, device_map="auto", max_memory={"cpu": "40KB"})
        assert on_meta(loaded)
        stock, ours = tmp_path / f"{kind.__name__} stock", tmp_path / f"{kind.__name__} ours"
        with pytest.warns(UserWarning, match="offloaded"):
            loaded.save_pretrained(stock, **options)
        hf.save_pretrained(loaded, ours, **options)
        for saved in (stock, ours):
            assert_same_tensors(weights(saved), weights(folder))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_tensors_that_stay_float32_in_memory_are_saved_as_by_transformers(written: Written, tmp_path: Path) -> None:
    kind, folder = model_class("t5"), written("t5")
    options = {"device_map": ALL, "dtype": "float16"}
    stock = kind.from_pretrained(folder, offload_folder=tmp_path / "offload", **options)
    stock.save_pretrained(tmp_path / "stock")
    hf.save_pretrained(load(kind, folder, **options), tmp_path / "ours")
    assert_same_tensors(weights(tmp_path / "ours"), weights(tmp_path / "stock"))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_tied_tensors_are_saved_as_by_transformers(tmp_path: Path, form: str) -> None:
    model = build("t5", tie_word_embeddings=True)
    hf.save_pretrained(model, tmp_path / "model", safe_serialization=form == "safetensors")
    if form == "bin":
        torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    kind = type(model)
    stock = kind.from_pretrained(tmp_path / "model", device_map=ALL, offload_folder=tmp_path / "offload")
    loaded = load(kind, tmp_path / "model", device_map=ALL)
    for step in ("before", "after"):
        for saved, offloaded in (("stock", stock), ("loaded", loaded)):
            offloaded.save_pretrained(tmp_path / step / saved)
        hf.save_pretrained(loaded, tmp_path / step / "ours")
        for saved in ("loaded", "ours"):
            assert_same_tensors(weights(tmp_path / step / saved), weights(tmp_path / step / "stock"))
        # Accelerate leaves ties by the first forward.
        assert same_bytes(logits(loaded), logits(stock))


@pytest.mark.parametrize("kind", [Llama, Moe])
def test_weights_are_sent_to_the_device_that_computes(written: Written, tmp_path: Path, kind: Any) -> None:
    # Meta stands for an accelerator: what is on disk and on the CPU is sent there for each forward.
    device_map = LAST | {"model.embed_tokens": "meta"}
    folder = written(kind.config_class.model_type)
    stock = kind.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    loaded = load(kind, folder, device_map=device_map)
    assert_same_models(stock, loaded)
    hooks = [module._hf_hook for module in loaded.modules() if getattr(module, "_hf_hook", None)]
    weights_map = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None))
    of_disk = {name for name in weights_map if weights_map[name].is_meta}
    assert of_disk == {
        name for name in loaded.state_dict() if name.startswith(("model.layers.1", "model.n", "lm_head"))
    }
    assert len(of_disk) < len(weights_map)


@pytest.mark.filterwarnings("ignore:for base_model:UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_of_peft_on_a_model_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)  # where peft writes a copy of the model
    folder = tmp_path / "models--tiny"
    build("llama").save_pretrained(folder)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(Llama.from_pretrained(folder), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    device_map = {f"base_model.model.{name}": device for name, device in LAST.items()}
    base = load(Llama, folder, device_map=LAST)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", device_map=device_map).eval()
    assert loaded.base_model.model.model.layers[1].mlp.up_proj.weight.is_meta
    assert same_bytes(logits(loaded), logits(adapted))


# Where fastload does more than transformers.


def test_no_folder_is_needed_and_none_is_written_to(written: Written, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="offload_folder"):
        Moe.from_pretrained(written("qwen3_moe"), device_map=ALL)
    expected = logits(Moe.from_pretrained(written("qwen3_moe")))
    before = {path: path.stat().st_mtime_ns for path in written("qwen3_moe").iterdir()}
    for options in ({}, {"offload_folder": tmp_path / "offload"}):
        assert same_bytes(logits(load(Moe, written("qwen3_moe"), device_map=ALL, **options)), expected)
    assert os.listdir(tmp_path) == []
    assert before == {path: path.stat().st_mtime_ns for path in written("qwen3_moe").iterdir()}


@pytest.mark.parametrize("kind", [Llama, Moe])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_files_that_are_replaced_are_read_as_they_were(written: Written, tmp_path: Path, kind: Any, dtype: str) -> None:
    family = kind.config_class.model_type
    build(family).save_pretrained(tmp_path, max_shard_size="50KB")
    expected = logits(kind.from_pretrained(tmp_path, dtype=dtype))
    loaded = load(kind, tmp_path, device_map=LAST, dtype=dtype)
    other = build(family, seed=1)
    other.save_pretrained(tmp_path / "other", max_shard_size="50KB")
    for path in (tmp_path / "other").iterdir():
        path.replace(tmp_path / path.name)
    assert same_bytes(logits(loaded), expected)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert same_bytes(logits(loaded), expected)


def test_a_file_that_is_cut_is_named(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    experts = load(Moe, tmp_path, device_map=ALL).model.layers[1].mlp.experts
    file = tmp_path / "model.safetensors"
    os.truncate(file, 4096)
    with pytest.raises(TruncatedFileError) as caught:
        experts._hf_hook.weights_map["gate_up_proj"]
    assert caught.value.file == str(file)
    assert f"file:     {file}" in str(caught.value)


@pytest.mark.parametrize(
    "on_disk", [("model.embed_tokens",), ("lm_head",), ("model.embed_tokens", "lm_head")], ids=" and ".join
)
@pytest.mark.parametrize("form", ["safetensors", "bin", "both names", "head alone"])
def test_tied_tensors_of_which_some_are_on_disk(tmp_path: Path, form: str, on_disk: tuple[str, ...]) -> None:
    model = build("llama", tie_word_embeddings=True)
    hf.save_pretrained(model, tmp_path, safe_serialization=form != "bin")
    if form in ("both names", "head alone"):
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if form == "head alone":
            del tensors["model.embed_tokens.weight"]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(Llama, tmp_path, device_map={name: "disk" if name in on_disk else "cpu" for name in LAST})
    for _ in range(2):
        assert same_bytes(logits(loaded), logits(model))
    # Accelerate leaves a tie by the first forward.
    assert on_meta(loaded) == {f"{name}.weight" for name in on_disk}


def test_tied_tensors_that_differ_in_the_file_are_not_tied(tmp_path: Path) -> None:
    build("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    expected = logits(Llama.from_pretrained(tmp_path))
    for on_disk in ({"lm_head"}, {"model.embed_tokens"}, set(LAST)):
        loaded = load(Llama, tmp_path, device_map={name: "disk" if name in on_disk else "cpu" for name in LAST})
        assert same_bytes(logits(loaded), expected)


def test_a_new_head_is_kept_in_memory(written: Written, tmp_path: Path) -> None:
    kind = transformers.LlamaForSequenceClassification
    options = {"num_labels": 3, "pad_token_id": 0}
    offloaded = {"device_map": ALL, "offload_folder": tmp_path / "offload"}
    assert_same_load(kind, written("llama"), **options, **offloaded)
    stock, loaded = with_the_same_seed(kind, written("llama"), **options)
    assert all(parameter.is_meta for parameter in loaded.parameters())
    assert same_bytes(logits(loaded), logits(stock))


def test_tensors_of_another_size_are_seen_by_the_load(written: Written) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(Llama, written("llama"), device_map=ALL, vocab_size=50)
    stock, loaded = with_the_same_seed(Llama, written("llama"), vocab_size=50, ignore_mismatched_sizes=True)
    assert same_bytes(logits(loaded), logits(stock))


def with_the_same_seed(kind: Any, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The model as transformers loads it into memory, and as fastload leaves it on disk."""
    torch.manual_seed(3)
    stock = kind.from_pretrained(folder, **options)
    torch.manual_seed(3)
    return stock, load(kind, folder, device_map=ALL, **options)


def test_copies_of_a_model_compute_the_same_when_it_is_gone(written: Written) -> None:
    loaded = load(Moe, written("qwen3_moe"), device_map=LAST)
    expected = logits(loaded)
    copied = copy.deepcopy(loaded)
    del loaded
    gc.collect()
    assert same_bytes(logits(copied), expected)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_forward_in_inference_mode_leaves_nothing_that_gradients_stumble_over(tmp_path: Path, form: str) -> None:
    hf.save_pretrained(build("llama"), tmp_path, safe_serialization=form == "safetensors")
    loaded = load(Llama, tmp_path, device_map=ALL)
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        expected = loaded(tokens).logits
    # The parameters are gone before a gradient could reach them, but what is before them gets its own.
    embedded = torch.rand(1, 12, 32, requires_grad=True)
    loaded(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert same_bytes(loaded(tokens).logits.detach(), expected.clone())


class Converted(transformers.LlamaForCausalLM):
    """A model whose files hold its projections transposed, and two of them side by side."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transposed = WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [Transpose(0, 1)])
    beside = WeightConverter("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(1)])
    register_checkpoint_conversion_mapping("Converted", [transposed, beside])
    folder = tmp_path_factory.mktemp("converted")
    randomised(Converted(build("llama").config)).save_pretrained(folder)
    assert load_file(folder / "model.safetensors")["model.layers.0.mlp.both.weight"].shape == (48, 64)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("device_map", [ALL, LAST], ids=["all", "last"])
def test_what_only_transformers_can_convert(
    converted: Path, tmp_path: Path, device_map: dict[str, str], dtype: str
) -> None:
    loaded = assert_same_offload(Converted, converted, tmp_path / "o", device_map=device_map, dtype=dtype)
    hf.save_pretrained(loaded, tmp_path / "saved")
    if dtype == "auto":
        assert_same_tensors(weights(tmp_path / "saved"), weights(converted))


def test_a_conversion_that_fails_is_told_by_the_load(converted: Path, tmp_path: Path) -> None:
    for path in converted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(Converted, tmp_path, device_map=ALL)


def test_other_libraries_find_the_index_that_transformers_would_give(written: Written, tmp_path: Path) -> None:
    def index(model: Any) -> Any:
        return model.model.layers[1].self_attn.q_proj._hf_hook.weights_map.dataset.index

    for kind in (Llama, Moe):
        folder = written(kind.config_class.model_type, max_shard_size="50KB")
        stock = index(kind.from_pretrained(folder, device_map=LAST, offload_folder=tmp_path)) if kind is Llama else None
        found = index(load(kind, folder, device_map=LAST))
        assert stock is None or found == stock
        assert {Path(entry["safetensors_file"]).parent for entry in found.values()} == {folder}


# Memory, descriptors and mappings.

MIB = 1 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 MiB of experts, page by page where they are in the fused parameters, in two files; and little else."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 2}
    build("qwen3_moe", **sizes).save_pretrained(folder, max_shard_size="26MB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def mappings_of(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def descriptors_of(folder: Path) -> list[str]:
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if link.is_symlink() and str(folder) in os.readlink(link)]


def n_private_bytes() -> int:
    gc.collect()
    found = private_bytes()
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_an_idle_model_has_no_memory_of_its_own(large: Path, dtype: str) -> None:
    logits(Moe.from_pretrained(large, dtype=dtype))  # what torch itself keeps from a forward
    before = n_private_bytes()
    loaded = load(Moe, large, device_map=ALL, dtype=dtype)
    for _ in range(3):
        assert n_private_bytes() - before < 6 * MIB
        logits(loaded)
    assert n_private_bytes() - before < 6 * MIB


def test_experts_in_use_are_pages_of_the_files(large: Path) -> None:
    experts = load(Moe, large, device_map=ALL).model.layers[0].mlp.experts
    before = n_private_bytes(), len(mappings_of(large))
    fused = experts._hf_hook.weights_map["gate_up_proj"]
    assert fused.nbytes == 16 * MIB
    assert float(fused.sum()) != 0
    assert n_private_bytes() - before[0] < 2 * MIB
    assert len(mappings_of(large)) > before[1]
    del fused
    assert len(mappings_of(large)) == before[1]


def test_each_file_is_mapped_and_opened_once_for_all_forwards(large: Path) -> None:
    gc.collect()
    loaded = load(Moe, large, device_map=ALL)
    before = sorted(mappings_of(large)), sorted(descriptors_of(large))
    for _ in range(2):
        logits(loaded)
        assert (sorted(mappings_of(large)), sorted(descriptors_of(large))) == before
    assert len(before[0]) == len(list(large.glob("*.safetensors")))


@pytest.mark.parametrize("device_map", [ALL, {"model": "disk", "lm_head": "cpu"}], ids=["all", "most"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_mappings_and_descriptors_end_with_the_model(large: Path, device_map: dict[str, str], dtype: str) -> None:
    loaded = load(Moe, large, device_map=device_map, dtype=dtype)
    logits(loaded)
    assert mappings_of(large)
    assert descriptors_of(large)
    del loaded
    gc.collect()
    assert mappings_of(large) == descriptors_of(large) == []
