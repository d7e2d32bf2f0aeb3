"""memory_budget=: blocks that do not fit are read for each forward, and nothing else of the model changes."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastload
from fastload import hf
from fastload.errors import FastloadError
from fastload.models.bert_heads import BertForMaskedLM
from tests.cold import make_cold, resident, wait_for_no_threads
from tests.conftest import same_bytes
from tests.streaming.stacks import (
    BLOCK_BYTES,
    TOKENS,
    Block,
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
REST_BYTES = 4 * (2 * 50 * 64 + 64)
# Room for three of six blocks: one stays, the others pass through the room of two.
BUDGET = REST_BYTES + 3 * BLOCK_BYTES
PAGE = 4096
READ_AHEAD = 256 << 10
LOADS: list[Any] = [
    pytest.param("bert", BertForMaskedLM.from_pretrained, 400_000, id="native"),
    pytest.param("llama", hf.AutoModelForCausalLM.from_pretrained, 500_000, id="transformers Llama"),
    pytest.param("llama-tied", hf.AutoModelForCausalLM.from_pretrained, 500_000, id="transformers Llama, tied"),
    pytest.param("moe", hf.AutoModelForCausalLM.from_pretrained, 8_000_000, id="transformers Qwen3-MoE"),
    pytest.param("llama", fastload.AutoModelForCausalLM.from_pretrained, 500_000, id="native Llama"),
    pytest.param("moe", fastload.AutoModelForCausalLM.from_pretrained, 8_000_000, id="native Qwen3-MoE"),
]


def load_stack(path: Path, **options: Any) -> Stack:
    model = on_meta()
    fastload.load_model(model, path, **options)
    return model.eval()


def passing(model: Stack) -> list[Block]:
    return [block for block in model.blocks if block._forward_hooks]  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as in the files", "cast"])
@pytest.mark.parametrize(("family", "load", "budget"), LOADS)
def test_every_forward_is_that_of_the_whole_model(
    written: Written, family: str, load: Callable[..., Any], budget: int, dtype: torch.dtype
) -> None:
    expected = output(load(written(family), dtype=dtype))
    model = load(written(family), dtype=dtype, memory_budget=budget * dtype.itemsize // 4)
    assert n_hooks(model) > 0
    for _ in range(3):
        assert same_bytes(output(model), expected)


def test_blocks_that_fit_stay_and_the_others_pass(stack_file: Path) -> None:
    model = load_stack(stack_file, memory_budget=BUDGET)
    assert [bool(block._forward_hooks) for block in model.blocks] == [False] + [True] * 5
    assert names_on_meta(model) == set()


def test_weights_that_are_made_are_there_during_their_forward_only(stack_file: Path) -> None:
    model = load_stack(stack_file, memory_budget=BUDGET // 2, dtype=torch.bfloat16)
    names = {name for i in range(1, 6) for name, _ in model.named_parameters() if name.startswith(f"blocks.{i}.")}
    assert names_on_meta(model) == names
    seen: list[set[str]] = []
    for block in model.blocks:
        block.up.register_forward_hook(lambda *_: seen.append(names_on_meta(model)))  # type: ignore[union-attr]
    output(model)
    assert [len(names - left) for left in seen] == [0, 5, 5, 5, 5, 5]
    assert names_on_meta(model) == names


def test_the_report_counts_what_passes_too(stack_file: Path) -> None:
    n_bytes = sum(tensor.nbytes for tensor in load_file(stack_file).values())
    assert fastload.report(load_stack(stack_file, memory_budget=BUDGET)).n_bytes == n_bytes


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_stack(path, n_blocks=40)
    return path


def test_memory_in_use_is_the_budget_and_no_more(large_file: Path) -> None:
    model = on_meta(n_blocks=40)
    make_cold(large_file)
    budget = REST_BYTES + 8 * BLOCK_BYTES
    fastload.load_model(model, large_file, memory_budget=budget)
    # A page that two tensors share stays with either; the header, and what the kernel reads ahead, come on top.
    limit = budget + len(model.state_dict()) * PAGE + READ_AHEAD
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, resident(large_file))

    for block in model.blocks:
        block.up.register_forward_hook(look)  # type: ignore[union-attr]
    for _ in range(2):
        output(model)
        assert resident(large_file) <= limit
    assert most <= limit
    assert most < large_file.stat().st_size // 2


def test_what_was_written_to_a_passing_block_stays(stack_file: Path) -> None:
    model = load_stack(stack_file, memory_budget=BUDGET)
    expected = load_stack(stack_file)
    for changed in (model, expected):
        with torch.no_grad():
            changed.blocks[3].up.weight.mul_(2)
            changed.blocks[4].norm.bias.add_(1)
            changed.blocks[5].down.weight[7] = 0.25
    for _ in range(3):
        assert same_bytes(output(model), output(expected))
    assert torch.equal(model.blocks[5].down.weight[7], torch.full((256,), 0.25))
    assert same_bytes(load_file(stack_file)["blocks.3.up.weight"] * 2, model.blocks[3].up.weight.detach())


def write_through_data(weight: torch.Tensor) -> None:
    weight.data.mul_(3)


def write_through_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[:] *= 3


def write_in_inference_mode(weight: torch.Tensor) -> None:
    with torch.inference_mode():
        weight.mul_(3)


@pytest.mark.parametrize("write", [write_through_data, write_through_numpy, write_in_inference_mode])
def test_whichever_way_it_was_written(stack_file: Path, write: Callable[[torch.Tensor], None]) -> None:
    model = load_stack(stack_file, memory_budget=BUDGET)
    expected = load_stack(stack_file)
    for changed in (model, expected):
        write(changed.blocks[3].up.weight)
    for _ in range(2):
        assert same_bytes(output(model), output(expected))


def test_weights_that_were_replaced_are_left_alone(stack_file: Path) -> None:
    model = load_stack(stack_file, memory_budget=BUDGET)
    expected = load_stack(stack_file)
    for changed in (model, expected):
        changed.double()
        changed.blocks[2].up.weight.data = changed.blocks[2].up.weight.data + 1
    for _ in range(2):
        assert same_bytes(output(model), output(expected))


def test_memory_that_took_the_place_of_weights_is_left_alone(written: Written) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(written("moe"), memory_budget=4_000_000)
    expected = hf.AutoModelForCausalLM.from_pretrained(written("moe")).bfloat16()
    output(model)
    model.bfloat16()
    gc.collect()
    others = [torch.full((8, 64, 64), float(i)) for i in range(40)]
    assert same_bytes(output(model), output(expected))
    assert all(bool((other == i).all()) for i, other in enumerate(others))


def test_an_exception_in_a_forward_leaves_the_model_usable(stack_file: Path) -> None:
    model = load_stack(stack_file, memory_budget=BUDGET // 2, dtype=torch.bfloat16)
    expected = output(load_stack(stack_file, dtype=torch.bfloat16))

    def fail(*_: Any) -> None:
        raise RuntimeError("of the caller's own")

    handle = model.blocks[3].down.register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="of the caller's own"):
            output(model)
    assert any(name.startswith("blocks.3.") for name in names_on_meta(model))
    handle.remove()
    assert same_bytes(output(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as in the files", "cast"])
def test_threads_that_run_forward_at_once(stack_file: Path, dtype: torch.dtype) -> None:
    model = load_stack(stack_file, memory_budget=BUDGET * dtype.itemsize // 4, dtype=dtype)
    expected = output(load_stack(stack_file, dtype=dtype))
    found: list[bool] = []

    def run() -> None:
        found.extend(same_bytes(output(model), expected) for _ in range(8))

    running = [threading.Thread(target=run) for _ in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert found == [True] * 24


def test_blocks_used_out_of_order_and_alone(stack_file: Path) -> None:
    model, expected = load_stack(stack_file, memory_budget=BUDGET), load_stack(stack_file)
    hidden = torch.randn(1, 3, 64)
    for index in (5, 2, 2, 0, 4, 1):
        assert same_bytes(model.blocks[index](hidden).detach(), expected.blocks[index](hidden).detach())


def test_gradients_of_mapped_weights(stack_file: Path) -> None:
    model, expected = load_stack(stack_file, memory_budget=BUDGET), load_stack(stack_file)
    for each in (model, expected):
        each(TOKENS).sum().backward()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert torch.equal(found.grad, wanted.grad)


def test_threads_files_and_memory_end_with_the_model(stack_file: Path) -> None:
    model = load_stack(stack_file, memory_budget=BUDGET)
    output(model)
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None
    wait_for_no_threads()
    assert descriptors_of(stack_file) == mappings_of(stack_file) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("options", [{"memory_budget": BUDGET}, {"lazy": True}], ids=["budget", "lazy"])
def test_a_copy_is_refused_with_the_reason(
    stack_file: Path, copied: Callable[[Any], Any], options: dict[str, Any]
) -> None:
    model = load_stack(stack_file, **options)
    with pytest.raises(FastloadError, match=r"cannot be copied") as caught:
        copied(model)
    assert "to do" in str(caught.value)
    assert same_bytes(output(model), output(load_stack(stack_file)))


def test_a_state_dict_of_mapped_weights_is_whole(stack_file: Path) -> None:
    model = load_stack(stack_file, memory_budget=BUDGET)
    output(model)
    expected = load_file(stack_file)
    assert {key for key, tensor in model.state_dict().items() if same_bytes(tensor, expected[key])} == set(expected)


def test_a_budgeted_model_of_mapped_weights_can_be_saved(written: Written, tmp_path: Path) -> None:
    model = BertForMaskedLM.from_pretrained(written("bert"), memory_budget=400_000)
    output(model)
    model.save_pretrained(tmp_path / "saved")
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", written("bert")))
    assert saved.keys() == original.keys()
    assert all(same_bytes(saved[key], tensor) for key, tensor in original.items())


@pytest.mark.parametrize("load", [BertForMaskedLM.from_pretrained, hf.AutoModelForMaskedLM.from_pretrained])
def test_weights_that_are_made_for_each_forward_cannot_be_saved(
    written: Written, tmp_path: Path, load: Callable[..., Any]
) -> None:
    model = load(written("bert"), memory_budget=200_000, dtype=torch.bfloat16)
    with pytest.raises((FastloadError, ValueError, NotImplementedError), match="meta"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))
