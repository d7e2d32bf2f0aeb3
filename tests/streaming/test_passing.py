"""Device maps of an accelerator and something beside it, for native models and for any module.

The accelerator is memory under the CPU's other name, "cpu:0", which accelerate takes for a device of its own.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules
from safetensors.torch import load_file, save_file
from torch import nn

import fastload
import fastload.filling
import fastload.placement.device_map
from fastload.errors import BlockError, OptionError
from fastload.placement.device_map import lay_out
from fastload.storage.ring import free_pinned_memory
from tests.cold import wait_for_no_threads
from tests.conftest import same_bytes
from tests.staging.devices import CountingDevice
from tests.streaming.stacks import BLOCK_BYTES, N_BLOCKS, Stack, names_on_meta, on_meta, output, write_stack

ACCELERATOR, SECOND = "cpu:0", "cpu:1"


def blocks(*numbers: int, place: str = ACCELERATOR) -> dict[str, str]:
    return {f"blocks.{number}": place for number in numbers}


STACK_MAPS: dict[str, dict[str, str]] = {
    "all but the head": {"embed": "cpu", "blocks": "cpu", "head": ACCELERATOR, "scale": ACCELERATOR},
    "blocks on disk": {"embed": ACCELERATOR, "blocks": "disk", "head": ACCELERATOR, "scale": ACCELERATOR},
    "every other block": {"": "cpu", "embed": ACCELERATOR} | blocks(*range(0, N_BLOCKS, 2)),
    "all but one block": {"": "disk"} | blocks(1),
    "parts of blocks": {"": "cpu", "blocks.0.up": "disk", "blocks.1.down": ACCELERATOR, "embed": ACCELERATOR},
}


@pytest.fixture(autouse=True, scope="module")
def no_thread_is_left_behind() -> Iterator[None]:
    yield
    gc.collect()
    wait_for_no_threads()
    free_pinned_memory()


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, CountingDevice]:
    """What staging reaches."""
    devices = {name: CountingDevice(name) for name in (ACCELERATOR, SECOND)}
    monkeypatch.setitem(fastload.filling.fill_module.__kwdefaults__, "devices", devices.get)
    return devices


@pytest.fixture
def device(devices: dict[str, CountingDevice]) -> CountingDevice:
    return devices[ACCELERATOR]


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    write_stack(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def hooks_of(model: nn.Module) -> list[Any]:
    found = [getattr(module, "_hf_hook", None) for module in model.modules()]
    return [single for hook in found if hook is not None for single in getattr(hook, "hooks", (hook,))]


def waits(model: nn.Module) -> bool:
    """Whether a hook of accelerate's own brings weights."""
    return any(type(hook) is AlignDevicesHook and hook.offload for hook in hooks_of(model))


def meant_elsewhere(model: nn.Module, device_map: dict[str, str]) -> set[str]:
    """Parameters whose longest name in a map is not on the accelerator."""
    found = set()
    for name, _ in model.named_parameters():
        parts = name.split(".")
        names = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
        if device_map[next(one for one in names if one in device_map)] != ACCELERATOR:
            found.add(name)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as in the files", "cast"])
@pytest.mark.parametrize("places", STACK_MAPS)
def test_what_is_beside_an_accelerator_comes_for_each_forward(
    stack: Path, device: CountingDevice, places: str, dtype: torch.dtype
) -> None:
    ordinary, model = on_meta(), on_meta()
    fastload.load_model(ordinary, stack, dtype=dtype)
    report = fastload.load_model(model, stack, dtype=dtype, device_map=STACK_MAPS[places])
    without_memory = meant_elsewhere(model, STACK_MAPS[places])
    assert without_memory
    for _ in range(3):
        assert names_on_meta(model) == without_memory
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert same_bytes(output(model), output(ordinary))
    assert not waits(model)
    assert model.hf_device_map == STACK_MAPS[places]
    assert any(note.startswith(f"{len(without_memory)} tensors stay in the files") for note in report.notes)


def test_what_lies_on_a_second_accelerator_stays_there_and_the_rest_computes_on_the_first(
    stack: Path, devices: dict[str, CountingDevice]
) -> None:
    ordinary, model = on_meta(), on_meta()
    fastload.load_model(ordinary, stack)
    places = {"": "cpu", "embed": ACCELERATOR, "head": SECOND} | blocks(0, 1) | blocks(4, 5, place=SECOND)
    fastload.load_model(model, stack, device_map=places)
    n_allocated = {name: sum(device.allocated) for name, device in devices.items()}
    assert n_allocated[SECOND] > 2 * BLOCK_BYTES
    for _ in range(2):
        assert names_on_meta(model) == {
            name for name in model.state_dict() if name.startswith(("blocks.2", "blocks.3"))
        }
        assert same_bytes(output(model), output(ordinary))
    assert sum(devices[SECOND].allocated) == n_allocated[SECOND]
    assert sum(devices[ACCELERATOR].allocated) > n_allocated[ACCELERATOR]


def test_the_next_block_is_on_its_way_while_one_computes(stack: Path, device: CountingDevice) -> None:
    model = on_meta()
    fastload.load_model(model, stack, device_map=STACK_MAPS["blocks on disk"])
    before = sum(device.allocated) - BLOCK_BYTES  # the first one is under way from the load on
    begun: list[int] = []
    for block in model.blocks:
        block.up.register_forward_pre_hook(lambda *_: begun.append(sum(device.allocated) - before))
    output(model)
    assert [round(n_bytes / BLOCK_BYTES) for n_bytes in begun] == list(range(2, N_BLOCKS + 2))


def test_a_block_whose_forward_uses_weights_of_modules_in_it(tmp_path: Path, device: CountingDevice) -> None:
    torch.manual_seed(0)

    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        return nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)).eval()

    written = encoder()
    fastload.save_model(written, tmp_path)
    with torch.device("meta"):
        model = encoder()
    fastload.load_model(model, tmp_path, device_map={"0": ACCELERATOR, "1": "cpu"})
    model.eval()
    inputs = torch.randn(2, 5, 8)
    with torch.no_grad():
        for _ in range(2):
            assert same_bytes(model(inputs), written(inputs))


@pytest.mark.parametrize("head", ["cpu", ACCELERATOR])
@pytest.mark.parametrize("embed", ["cpu", ACCELERATOR])
def test_a_tensor_of_two_names(tmp_path: Path, device: CountingDevice, embed: str, head: str) -> None:
    written = write_stack(tmp_path / "model.safetensors", tied=True)
    state = load_file(tmp_path / "model.safetensors")
    del state["head.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model = on_meta(tied=True)
    fastload.load_model(model, tmp_path, device_map={"": "cpu", "embed": embed, "head": head} | blocks(0))
    passing = {"embed.weight", "head.weight"} & names_on_meta(model)
    assert passing == ({"embed.weight", "head.weight"} if embed == head == "cpu" else set())
    for _ in range(2):
        assert same_bytes(output(model), output(written))
        assert model.head.weight is model.embed.weight


def test_a_tensor_of_two_names_that_the_files_have_twice(tmp_path: Path, device: CountingDevice) -> None:
    written = write_stack(tmp_path / "model.safetensors", tied=True)
    model = on_meta(tied=True)
    fastload.load_model(model, tmp_path, device_map={"": "cpu"} | blocks(0))
    for _ in range(2):
        assert same_bytes(output(model), output(written))


def test_what_cannot_be_staged_is_made_in_memory_once(tmp_path: Path, device: CountingDevice) -> None:
    torch.manual_seed(0)
    written = Stack()
    state = dict(written.state_dict())
    state["blocks.2.up.weight"] = state["blocks.2.up.weight"].t().contiguous().t()
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = on_meta()
    fastload.load_model(model, tmp_path, device_map={"": "cpu", "head": ACCELERATOR})
    for _ in range(2):
        assert same_bytes(output(model), output(written))
    (hook,) = hooks_of(model.blocks[2])
    assert hook.weights_map["up.weight"].data_ptr() == hook.weights_map["up.weight"].data_ptr()


def test_the_model_can_be_saved_before_and_after_a_forward(stack: Path, device: CountingDevice, tmp_path: Path) -> None:
    model = on_meta()
    fastload.load_model(model, stack, device_map=STACK_MAPS["every other block"])
    expected = load_file(stack)
    for step in ("before", "after"):
        fastload.save_model(model, tmp_path / step)
        saved = load_file(tmp_path / step / "model.safetensors")
        assert saved.keys() == expected.keys()
        assert [name for name, tensor in saved.items() if not same_bytes(tensor, expected[name])] == []
        output(model)


def test_a_copy_computes_when_the_model_is_gone(stack: Path, device: CountingDevice) -> None:
    model = on_meta()
    fastload.load_model(model, stack, device_map=STACK_MAPS["every other block"])
    expected = output(model)
    copied = copy.deepcopy(model)
    del model
    gc.collect()
    assert same_bytes(output(copied), expected)


def test_a_file_that_another_one_replaces_is_read_on(stack: Path, device: CountingDevice) -> None:
    model = on_meta()
    fastload.load_model(model, stack, device_map=STACK_MAPS["parts of blocks"])
    expected = output(model)
    state = {key: torch.zeros_like(tensor) for key, tensor in load_file(stack).items()}
    stack.unlink()
    save_file(state, stack, {"format": "pt"})
    for _ in range(2):
        assert same_bytes(output(model), expected)


def test_a_file_that_is_cut_is_told_by_the_forward_that_needs_it(stack: Path, device: CountingDevice) -> None:
    model = on_meta()
    fastload.load_model(model, stack, device_map=STACK_MAPS["blocks on disk"])
    expected = output(model)
    contents = stack.read_bytes()
    os.truncate(stack, 2048)
    with suppress(BlockError):
        output(model)  # blocks may have come before the cut
    with pytest.raises(BlockError, match=r"model\.safetensors") as caught:
        output(model)
    assert str(caught.value.key).startswith("blocks.")
    with stack.open("r+b") as opened:
        opened.write(contents)
    assert same_bytes(output(model), expected)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_a_native_model_computes_and_is_saved_as_without_a_map(
    tmp_path: Path, device: CountingDevice, family: str, tied: bool
) -> None:
    model_class = getattr(fastload, f"{family}ForCausalLM")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if family == "Qwen3Moe" else {}
    config = getattr(fastload, f"{family}Config")(**sizes, **heads, **experts, tie_word_embeddings=tied)
    model_class(config).save_pretrained(tmp_path / "written")
    ordinary = model_class.from_pretrained(tmp_path / "written")
    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": ACCELERATOR, "lm_head": "disk"}
    places |= {"model.layers.2": "disk", "model.layers.1.self_attn.o_proj": ACCELERATOR, "model": "cpu"}
    model = model_class.from_pretrained(tmp_path / "written", device_map=places)
    assert model.hf_device_map == places
    without_memory = meant_elsewhere(model, places) | ({"lm_head.weight"} if tied else set())
    prompt = torch.arange(3, 9)[None]
    for step in ("before", "after"):
        assert names_on_meta(model) == without_memory
        model.save_pretrained(tmp_path / step)
        assert (tmp_path / step / "model.safetensors").read_bytes() == (
            tmp_path / "written" / "model.safetensors"
        ).read_bytes()
        assert same_bytes(output(model, prompt), output(ordinary, prompt))
    assert torch.equal(model.generate(prompt, max_new_tokens=5), ordinary.generate(prompt, max_new_tokens=5))
    assert not waits(model)


def test_what_no_file_has_passes_too(tmp_path: Path, device: CountingDevice) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    config = fastload.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    fastload.LlamaModel(config).save_pretrained(tmp_path / "base")
    model_class = fastload.LlamaForSequenceClassification
    model = model_class.from_pretrained(tmp_path / "base", device_map={"model": ACCELERATOR, "score": "cpu"})
    assert names_on_meta(model) == {"score.weight"}
    prompt = torch.arange(3, 9)[None]
    expected = output(model, prompt)
    model.save_pretrained(tmp_path / "whole")
    for loaded in (model, model_class.from_pretrained(tmp_path / "whole")):
        assert same_bytes(output(loaded, prompt), expected)


def test_beside_an_accelerator_that_staging_does_not_reach_weights_come_from_memory(stack: Path) -> None:
    ordinary, model = on_meta(), on_meta()
    fastload.load_model(ordinary, stack)
    report = fastload.load_model(model, stack, device_map=STACK_MAPS["every other block"])
    assert not any("stay in the files" in note for note in report.notes)
    for _ in range(2):
        assert names_on_meta(model) == meant_elsewhere(model, STACK_MAPS["every other block"])
        assert same_bytes(output(model), output(ordinary))


def test_without_hooks_a_module_is_as_others(stack: Path, device: CountingDevice) -> None:
    ordinary, model = on_meta(), on_meta()
    fastload.load_model(ordinary, stack)
    fastload.load_model(model, stack, device_map=STACK_MAPS["every other block"])
    output(model)
    remove_hook_from_submodules(model)
    assert not names_on_meta(model)
    assert same_bytes(output(model), output(ordinary))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device_map": {"embed": "cpu", "layers": "cpu"}}, "layers"),
        ({"device_map": {"embed": ACCELERATOR, "blocks": "cpu"}}, r"head\.weight|scale"),
        ({"device_map": {"": "cuda:99"}}, "cuda:99"),
        ({"device_map": {"": "warp"}}, "warp"),
        ({"device_map": {"": "cpu", "head": "xla:1"}}, "xla:1"),
        ({"device_map": "everywhere"}, "everywhere"),
        ({"device_map": "cpu", "device": "cpu"}, "device"),
        ({"max_memory": {"cpu": "1GB"}}, "device_map='auto'"),
        ({"device_map": {"": "cpu", "head": ACCELERATOR}, "memory_budget": "1GB"}, "memory_budget"),
        ({"device_map": {"": "cpu", "head": ACCELERATOR}, "detached": True}, "detached"),
        ({"device_map": {"": "cpu", "head": ACCELERATOR}, "stream": True}, "stream"),
        ({"device_map": {"": "cpu", "head": ACCELERATOR}, "dedup": "node"}, "dedup"),
    ],
    ids=str,
)
def test_a_map_that_cannot_be_followed_is_refused(stack: Path, options: dict[str, Any], named: str) -> None:
    model = on_meta()
    with pytest.raises(OptionError, match=named):
        fastload.load_model(model, stack, **options)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_map_for_a_module_in_memory_is_refused(stack: Path) -> None:
    with pytest.raises(OptionError, match="meta"):
        fastload.load_model(Stack(), stack, device_map="cpu")


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": "disk"}, torch.device("cpu")], ids=str)
def test_maps_of_one_device_fill_a_module_as_ever(stack: Path, device_map: Any) -> None:
    ordinary, model = on_meta(), on_meta()
    fastload.load_model(ordinary, stack)
    fastload.load_model(model, stack, device_map=device_map)
    assert not names_on_meta(model)
    assert not hooks_of(model)
    assert same_bytes(output(model), output(ordinary))


def test_what_exceeds_max_memory_is_read_for_each_forward(stack: Path) -> None:
    ordinary, model = on_meta(), on_meta()
    fastload.load_model(ordinary, stack)
    fastload.load_model(model, stack, device_map="auto", max_memory={"cpu": 4 * BLOCK_BYTES})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    # Blocks stay whole.
    assert not any(name.startswith("blocks.") and name.count(".") > 1 for name in model.hf_device_map)
    for _ in range(2):
        assert same_bytes(output(model), output(ordinary))


def test_a_budget_beside_a_strategy_is_the_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"embed": "cuda:0", "blocks": "cpu", "head": "cpu", "scale": "cpu", "shift": "cpu"}
    monkeypatch.setattr(fastload.placement.device_map, "resolve_device_map", lambda *given: places)
    layout = lay_out(on_meta(), "auto", None, None, "1MB", ())
    assert layout.placed_on == {"": "cuda:0"}
    assert layout.memory_budget == "1MB"
    assert not layout.is_dispatched
