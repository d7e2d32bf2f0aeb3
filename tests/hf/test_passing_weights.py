"""Device maps of an accelerator and something beside it: what is beside comes a block at a time, for each forward.

The accelerator is memory under the CPU's other name, "cpu:0", which accelerate and transformers take for a device of
its own. (accelerate's own hooks stumble over it: torch tells of no tensor that it is there.) Where a model is held
beside transformers', what is on disk is staged to "cpu".
"""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook

import fastload
import fastload.hf.placing
from fastload import hf
from fastload.errors import BlockError
from fastload.storage.devices import too_little_memory
from fastload.storage.ring import free_pinned_memory
from tests.cold import wait_for_no_threads
from tests.conftest import same_bytes
from tests.hf.families import build
from tests.hf.offloaded import assert_same_offload, load, logits, on_meta
from tests.hf.saved import assert_same_tensors, weights
from tests.staging.devices import CountingDevice

Written = Callable[..., Path]
FolderOf = Callable[[Any], Path]
Llama = transformers.LlamaForCausalLM
Moe = transformers.Qwen3MoeForCausalLM
KINDS = [(Llama, "auto"), (Moe, "auto"), (Moe, "bfloat16")]

ACCELERATOR = "cpu:0"
PARTS = ["model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "lm_head"]
# For models of four layers.
MAPS = {
    "all but the head": {"model": "cpu", "lm_head": ACCELERATOR},
    "blocks": dict.fromkeys(PARTS, ACCELERATOR) | {"model.layers": "cpu", "model.rotary_emb": "cpu"},
    "blocks on disk": dict.fromkeys(PARTS, ACCELERATOR) | {"model.layers": "disk", "model.rotary_emb": "cpu"},
    "some here and some there": {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": ACCELERATOR}
    | {f"model.layers.{number}": "disk" if number % 2 else "cpu" for number in range(4)}
    | {"lm_head": "cpu"},
}
# Parts of blocks too, for models of two layers, of which transformers can run those on disk.
ON_DISK = {
    "all": {"": "disk"},
    "blocks": dict.fromkeys(PARTS, "cpu") | {"model.layers": "disk"},
    "parts of blocks": dict.fromkeys(PARTS, "disk")
    | {"model.layers.1": "cpu", "model.layers.0.self_attn": "disk", "model.layers.0.mlp": "cpu"}
    | {"model.layers.0.input_layernorm": "cpu", "model.layers.0.post_attention_layernorm": "disk"},
}
del ON_DISK["parts of blocks"]["model.layers"]


@pytest.fixture(autouse=True)
def staged_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[CountingDevice], CountingDevice]]:
    """Have staging reach a device under its name. No thread is left behind."""

    def reach(device: CountingDevice) -> CountingDevice:
        monkeypatch.setattr(fastload.hf.placing, "device_for", lambda name: device if name == device.name else None)
        return device

    yield reach
    gc.collect()
    wait_for_no_threads()
    free_pinned_memory()


@pytest.fixture
def device(staged_to: Callable[[CountingDevice], CountingDevice]) -> CountingDevice:
    return staged_to(CountingDevice(ACCELERATOR))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Models of four layers, in shards."""
    folders: dict[Any, Path] = {}

    def write(kind: Any) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind.__name__)
            build(kind.config_class.model_type, num_hidden_layers=4).save_pretrained(
                folders[kind], max_shard_size="50KB"
            )
        return folders[kind]

    return write


class Memory(np.ndarray):  # type: ignore[type-arg]
    """Memory that can be referred to weakly."""

    def __new__(cls, size: int, dtype: Any) -> Memory:
        return np.empty(size, dtype).view(cls)


def hooks_of(model: Any) -> list[Any]:
    found = [getattr(module, "_hf_hook", None) for module in model.modules()]
    return [single for hook in found if hook is not None for single in getattr(hook, "hooks", (hook,))]


def is_accelerates(hook: Any) -> bool:
    return type(hook) is AlignDevicesHook and hook.offload


@pytest.mark.parametrize("places", ON_DISK)
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_model_on_disk_lies_and_computes_as_in_transformers(
    written: Written, staged_to: Any, tmp_path: Path, kind: Any, places: str, dtype: str
) -> None:
    device = staged_to(CountingDevice("cpu"))
    folder = written(kind.config_class.model_type, max_shard_size="50KB")
    loaded = assert_same_offload(kind, folder, tmp_path, device_map=ON_DISK[places], dtype=dtype)
    assert not any(map(is_accelerates, hooks_of(loaded)))
    assert device.allocated


@pytest.mark.parametrize("places", MAPS)
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_what_is_beside_an_accelerator_computes_there(
    folder_of: FolderOf, device: CountingDevice, kind: Any, places: str, dtype: str
) -> None:
    expected = logits(kind.from_pretrained(folder_of(kind), dtype=dtype))
    loaded = load(kind, folder_of(kind), device_map=MAPS[places], dtype=dtype)
    assert loaded.hf_device_map == MAPS[places]
    elsewhere = tuple(f"{name}." for name, place in MAPS[places].items() if place != ACCELERATOR)
    without_memory = {name for name in loaded.state_dict() if name.startswith(elsewhere)}
    for _ in range(3):
        assert on_meta(loaded) == without_memory
        assert same_bytes(logits(loaded), expected)
    assert not any(map(is_accelerates, hooks_of(loaded)))
    note = f"{len(without_memory)} tensors stay in the files"
    assert any(one.startswith(note) for one in fastload.report(loaded).notes)


def test_the_next_block_is_on_its_way_while_one_computes(folder_of: FolderOf, device: CountingDevice) -> None:
    loaded = load(Llama, folder_of(Llama), device_map=MAPS["blocks"])
    # Those of what stays come first; the scratch of a transfer that converts nothing is empty.
    begun: list[list[int]] = []
    for layer in loaded.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda *_: begun.append(list(filter(None, device.allocated))))
    logits(loaded)
    n_layers = [len(allocated) - len(begun[0]) for allocated in begun]
    # Two are under way or in use when the first one computes; the last one begins the first again.
    per_layer = n_layers[1]
    assert per_layer > 0
    assert n_layers == [number * per_layer for number in range(4)]
    assert loaded.model.layers[0].self_attn.o_proj.weight.is_meta


@pytest.mark.parametrize("places", ["all but the head", "some here and some there"])
# transformers 5.17 takes the device of the first parameter for the model's, with accelerate's hooks as with these.
@pytest.mark.filterwarnings("ignore:You are calling .generate")
def test_texts_are_generated(folder_of: FolderOf, device: CountingDevice, places: str) -> None:
    prompt = {"input_ids": torch.arange(3, 9)[None], "max_new_tokens": 5, "do_sample": False}
    expected = Llama.from_pretrained(folder_of(Llama)).generate(**prompt)
    loaded = load(Llama, folder_of(Llama), device_map=MAPS[places])
    assert torch.equal(loaded.generate(**prompt), expected)


@pytest.mark.parametrize("kind", [Llama, Moe])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_the_model_can_be_saved_before_and_after_a_forward(
    folder_of: FolderOf, device: CountingDevice, tmp_path: Path, kind: Any
) -> None:
    loaded = load(kind, folder_of(kind), device_map=MAPS["some here and some there"])
    for step in ("before", "after"):
        loaded.save_pretrained(tmp_path / step / "stock")
        hf.save_pretrained(loaded, tmp_path / step / "ours")
        for saved in ("stock", "ours"):
            assert_same_tensors(weights(tmp_path / step / saved), weights(folder_of(kind)))
        logits(loaded)


def test_a_copy_computes_when_the_model_is_gone(folder_of: FolderOf, device: CountingDevice) -> None:
    loaded = load(Moe, folder_of(Moe), device_map=MAPS["blocks"])
    expected = logits(loaded)
    copied = copy.deepcopy(loaded)
    del loaded
    gc.collect()
    assert same_bytes(logits(copied), expected)


@pytest.mark.parametrize("places", [{"lm_head"}, {"model.embed_tokens"}, {"lm_head", "model.embed_tokens"}], ids=str)
def test_a_tensor_of_two_names_of_which_some_are_on_disk(tmp_path: Path, staged_to: Any, places: set[str]) -> None:
    staged_to(CountingDevice("cpu"))
    build("llama", num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(tmp_path)
    expected = logits(Llama.from_pretrained(tmp_path))
    loaded = load(Llama, tmp_path, device_map={part: "disk" if part in places else "cpu" for part in PARTS})
    for _ in range(2):
        assert same_bytes(logits(loaded), expected)


def test_a_tensor_of_two_names_comes_under_both(tmp_path: Path, device: CountingDevice) -> None:
    build("llama", num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(tmp_path)
    expected = logits(Llama.from_pretrained(tmp_path))
    loaded = load(Llama, tmp_path, device_map=dict.fromkeys(PARTS, "cpu") | {"model.norm": ACCELERATOR})
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= on_meta(loaded)
    for _ in range(2):
        assert same_bytes(logits(loaded), expected)


def test_tensors_that_stay_float32_are_float32_where_they_compute(tmp_path: Path, device: CountingDevice) -> None:
    model = build("t5")
    model.save_pretrained(tmp_path)
    kind = type(model)
    parts = ["shared", "decoder", "lm_head", *(f"encoder.{part}" for part in ("embed_tokens", "block", "dropout"))]
    places = dict.fromkeys(parts, "cpu") | {"encoder.final_layer_norm": ACCELERATOR}
    expected = logits(kind.from_pretrained(tmp_path, dtype="float16"))
    loaded = load(kind, tmp_path, device_map=places, dtype="float16")
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert same_bytes(logits(loaded), expected)


def test_what_cannot_be_staged_is_made_in_memory_once(tmp_path: Path, device: CountingDevice) -> None:
    model = build("llama", num_hidden_layers=4)
    hf.save_pretrained(model, tmp_path, safe_serialization=False)
    state = model.state_dict()
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].t().contiguous().t()
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = load(Llama, tmp_path, device_map=MAPS["blocks"])
    for _ in range(2):
        assert same_bytes(logits(loaded), logits(model))
    hook = loaded.model.layers[1].mlp.up_proj._hf_hook
    assert hook.weights_map["weight"].data_ptr() == hook.weights_map["weight"].data_ptr()


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_file_that_is_cut_is_told_by_the_forward_that_needs_it(
    tmp_path: Path, device: CountingDevice, place: str
) -> None:
    build("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    loaded = load(Llama, tmp_path, device_map=MAPS["blocks"] | {"model.layers": place})
    expected = logits(loaded)
    file = tmp_path / "model.safetensors"
    contents = file.read_bytes()
    os.truncate(file, 2048)
    with suppress(BlockError):
        logits(loaded)  # blocks may have come before the cut
    with pytest.raises(BlockError, match=r"model\.safetensors") as caught:
        logits(loaded)
    assert caught.value.key.startswith("model.layers.")
    with file.open("r+b") as opened:
        opened.write(contents)
    for _ in range(2):
        assert same_bytes(logits(loaded), expected)


def test_without_room_for_two_blocks_they_come_one_by_one(
    folder_of: FolderOf, staged_to: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Small(CountingDevice):
        """A device that has no room for another block once it is said to be full."""

        is_full = False

        def __init__(self) -> None:
            super().__init__(ACCELERATOR)
            self.in_use: list[weakref.ref[Any]] = []

        def allocate(self, sizes: Any) -> list[torch.Tensor]:
            if self.is_full and any(reference() is not None for reference in self.in_use):
                raise too_little_memory(self, sum(sizes))
            arrays = [Memory(size, np.uint8) for size in sizes]
            self.in_use += [weakref.ref(array) for array in arrays if array.size]
            return [torch.from_numpy(array) for array in arrays]

    device = staged_to(Small())
    expected = logits(load(Llama, folder_of(Llama)))
    # What stays is given memory at once, and forgotten here; blocks are what is left to look at.
    loaded = load(Llama, folder_of(Llama), device_map=MAPS["blocks"])
    device.in_use.clear()
    logits(loaded)
    device.is_full = True
    for _ in range(2):
        assert same_bytes(logits(loaded), expected)
    assert sum("want of device memory" in record.message for record in caplog.records) == 1


def test_a_map_of_a_model_in_memory_is_left_to_accelerate(folder_of: FolderOf, device: CountingDevice) -> None:
    model = build("llama", num_hidden_layers=4)
    loaded = load(Llama, None, config=model.config, state_dict=model.state_dict(), device_map=MAPS["blocks"])
    assert any(map(is_accelerates, hooks_of(loaded)))
    assert not device.allocated
