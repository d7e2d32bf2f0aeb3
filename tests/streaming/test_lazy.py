"""lazy=True: a block's weights come with its first use, and then the model is as any other."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastload
from fastload import hf
from fastload.models.bert_heads import BertForMaskedLM
from tests.conftest import same_bytes
from tests.streaming.stacks import (
    TOKENS,
    Stack,
    descriptors_of,
    mappings_of,
    n_hooks,
    names_on_meta,
    on_meta,
    output,
    write_stack,
)

Written = Callable[[str], Path]
Load = Callable[..., Any]
LOADS: list[Any] = [
    pytest.param("bert", BertForMaskedLM.from_pretrained, id="native"),
    pytest.param("bert", hf.AutoModelForMaskedLM.from_pretrained, id="transformers BERT"),
    pytest.param("llama", hf.AutoModelForCausalLM.from_pretrained, id="transformers Llama"),
    pytest.param("llama-tied", hf.AutoModelForCausalLM.from_pretrained, id="transformers Llama, tied"),
    pytest.param("moe", hf.AutoModelForCausalLM.from_pretrained, id="transformers Qwen3-MoE, fused experts"),
    pytest.param("llama", fastload.AutoModelForCausalLM.from_pretrained, id="native Llama"),
    pytest.param("moe", fastload.AutoModelForCausalLM.from_pretrained, id="native Qwen3-MoE"),
]


def lazy_stack(path: Path, **options: Any) -> Stack:
    model = on_meta()
    fastload.load_model(model, path, lazy=True, **options)
    return model.eval()


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    assert [key for key in wanted if not same_bytes(found[key], wanted[key])] == []


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=["as in the files", "cast"])
@pytest.mark.parametrize(("family", "load"), LOADS)
def test_all_but_the_first_parameter_comes_with_the_first_forward(
    written: Written, family: str, load: Load, options: dict[str, Any]
) -> None:
    ordinary = load(written(family), **options)
    model = load(written(family), lazy=True, **options)
    first, *_ = model.parameters()
    parameters = model.named_parameters(remove_duplicate=False)
    assert names_on_meta(model) == {name for name, parameter in parameters if parameter is not first}
    # Scripts ask a model where its inputs shall be.
    assert (model.device, model.dtype) == (ordinary.device, ordinary.dtype)
    assert same_bytes(output(model), output(ordinary))
    assert names_on_meta(model) == set()
    assert n_hooks(model) == n_hooks(ordinary) == 0
    assert_same_state(model, ordinary)
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in ordinary.parameters()}
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in ordinary.parameters()]


@pytest.mark.parametrize(("family", "load"), LOADS)
def test_wait_brings_everything(written: Written, family: str, load: Load) -> None:
    model = load(written(family), lazy=True)
    fastload.wait(model)
    assert names_on_meta(model) == set()
    assert n_hooks(model) == 0
    assert_same_state(model, load(written(family)))
    fastload.wait(model)


def test_wait_does_nothing_for_a_model_that_is_there() -> None:
    model = Stack(n_blocks=1)
    before = model.state_dict()
    fastload.wait(model)
    assert all(tensor is before[key] or torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_block_that_is_used_alone_brings_itself_only(stack_file: Path) -> None:
    model = lazy_stack(stack_file)
    hidden = torch.randn(1, 3, 64)
    found = model.blocks[2](hidden)
    assert names_on_meta(model) == {
        name for name in dict(model.named_parameters()) if not name.startswith(("blocks.2.", "embed."))
    } | {"scale"}
    ordinary = on_meta()
    fastload.load_model(ordinary, stack_file)
    assert torch.equal(found, ordinary.blocks[2](hidden))


def test_a_layer_within_a_block_brings_the_block(stack_file: Path) -> None:
    model = lazy_stack(stack_file)
    model.blocks[1].up(torch.ones(1, 64))
    assert not any(name.startswith("blocks.1.") for name in names_on_meta(model))
    assert any(name.startswith("blocks.0.") for name in names_on_meta(model))


def test_buffers_of_the_file_come_too_and_computed_ones_are_there(stack_file: Path, tmp_path: Path) -> None:
    tensors = load_file(stack_file)
    tensors["scale"] = torch.arange(64.0)
    save_file(tensors, tmp_path / "model.safetensors")
    model = lazy_stack(tmp_path / "model.safetensors")
    assert torch.equal(model.shift, torch.full((64,), 0.5))
    fastload.wait(model)
    assert torch.equal(model.scale, torch.arange(64.0))
    assert [name for name, _ in model.named_buffers()] == ["scale", "shift"]


def test_a_tie_of_a_module_stays_one_parameter(tmp_path: Path) -> None:
    written = write_stack(tmp_path / "model.safetensors", tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    model = on_meta(tied=True)
    fastload.load_model(model, tmp_path, lazy=True)
    assert same_bytes(output(model), output(written))
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("is_equal", [True, False])
def test_two_names_of_a_tie_in_the_files_are_one_where_they_are_equal(tmp_path: Path, is_equal: bool) -> None:
    write_stack(tmp_path / "model.safetensors", tied=True)
    if not is_equal:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["head.weight"] += 1
        save_file(tensors, tmp_path / "model.safetensors")
    models = [on_meta(tied=True), on_meta(tied=True)]
    fastload.load_model(models[0], tmp_path)
    fastload.load_model(models[1], tmp_path, lazy=True)
    assert same_bytes(output(models[0]), output(models[1]))
    assert_same_state(models[1], models[0])
    assert [model.head.weight is model.embed.weight for model in models] == [is_equal, is_equal]


def test_a_tied_head_of_transformers_is_the_embedding(written: Written) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(written("llama-tied"), lazy=True)
    output(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_module_with_memory_is_filled_at_once(stack_file: Path) -> None:
    model = Stack()
    kept = model.blocks[0].up.weight
    fastload.load_model(model, stack_file, lazy=True)
    assert model.blocks[0].up.weight is kept
    assert same_bytes(kept.detach(), load_file(stack_file)["blocks.0.up.weight"])


def test_threads_that_run_forward_at_once_bring_every_block_once(stack_file: Path) -> None:
    expected = output(lazy_stack(stack_file))
    model = lazy_stack(stack_file)
    start = threading.Barrier(4)
    found: list[torch.Tensor] = []

    def run() -> None:
        start.wait()
        found.append(output(model))

    running = [threading.Thread(target=run) for _ in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(30)
    assert [same_bytes(one, expected) for one in found] == [True] * 4
    assert n_hooks(model) == 0


def test_a_model_can_be_trained_after_its_first_forward(stack_file: Path) -> None:
    model = lazy_stack(stack_file)
    model(TOKENS).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    before = model.blocks[0].up.weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.blocks[0].up.weight, before)
    assert same_bytes(load_file(stack_file)["blocks.0.up.weight"], before)


@pytest.mark.parametrize(("family", "load"), [LOADS[0], LOADS[4]])
def test_a_model_that_was_waited_for_is_saved_as_it_was(
    written: Written, family: str, load: Load, tmp_path: Path
) -> None:
    model = load(written(family), lazy=True)
    fastload.wait(model)
    model.save_pretrained(tmp_path / "saved")
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", written(family)))
    assert saved.keys() == original.keys()
    assert all(same_bytes(saved[key], tensor) for key, tensor in original.items())


def test_a_model_that_was_never_used_leaves_nothing_behind(stack_file: Path) -> None:
    model = lazy_stack(stack_file)
    del model
    gc.collect()
    assert descriptors_of(stack_file) == mappings_of(stack_file) == 0
