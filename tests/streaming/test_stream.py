"""stream=True: the load returns at once, and the blocks come in the order of use while the model runs."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastload
from fastload import hf
from fastload.models.bert_heads import BertForMaskedLM
from tests.cold import make_cold, threads, wait_for_no_threads
from tests.conftest import same_bytes
from tests.streaming.stacks import (
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
N_LARGE = 80
LOADS: list[Any] = [
    pytest.param("bert", BertForMaskedLM.from_pretrained, id="native"),
    pytest.param("llama", hf.AutoModelForCausalLM.from_pretrained, id="transformers Llama"),
    pytest.param("llama-tied", hf.AutoModelForCausalLM.from_pretrained, id="transformers Llama, tied"),
    pytest.param("moe", hf.AutoModelForCausalLM.from_pretrained, id="transformers Qwen3-MoE"),
    pytest.param("moe", fastload.AutoModelForCausalLM.from_pretrained, id="native Qwen3-MoE"),
]


def stream_stack(path: Path, **options: Any) -> Stack:
    model = on_meta()
    fastload.load_model(model, path, stream=True, **options)
    return model


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=["as in the files", "cast"])
@pytest.mark.parametrize(("family", "load"), LOADS)
def test_a_forward_right_after_the_load_is_right(
    written: Written, family: str, load: Callable[..., Any], options: dict[str, Any]
) -> None:
    ordinary = load(written(family), **options)
    model = load(written(family), stream=True, **options)
    assert same_bytes(output(model), output(ordinary))
    fastload.wait(model)
    assert names_on_meta(model) == set()
    assert n_hooks(model) == 0
    wait_for_no_threads()
    expected = ordinary.state_dict()
    assert [key for key, tensor in model.state_dict().items() if not same_bytes(tensor, expected[key])] == []


def test_the_blocks_come_without_being_used(stack_file: Path) -> None:
    model = stream_stack(stack_file)
    wait_for_no_threads()
    assert names_on_meta(model) == set()
    assert n_hooks(model) == 0


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """Cast to another type, it takes longer than it takes the load to return."""
    path = tmp_path / "model.safetensors"
    write_stack(path, dtype=torch.bfloat16, n_blocks=N_LARGE)
    return path


def stream_large(path: Path) -> Stack:
    model = on_meta(n_blocks=N_LARGE)
    fastload.load_model(model, path, stream=True, dtype=torch.float32)
    return model


def test_the_load_returns_before_the_weights_are_there(large_file: Path) -> None:
    make_cold(large_file)
    model = stream_large(large_file)
    left = names_on_meta(model)
    assert "fastload-stream" in threads()
    assert any(name.startswith(f"blocks.{N_LARGE - 1}.") for name in left)
    fastload.wait(model)
    assert names_on_meta(model) == set()


def test_blocks_arrive_in_the_order_of_use(large_file: Path) -> None:
    model = stream_large(large_file)
    left = range(N_LARGE)
    while left:
        # Looked at from behind, so that what arrives meanwhile cannot make a gap.
        seen = [index for index in reversed(range(N_LARGE)) if model.blocks[index].up.weight.is_meta]
        assert seen == list(reversed(range(N_LARGE - len(seen), N_LARGE)))
        assert len(seen) <= len(left)
        left = range(len(seen))
    fastload.wait(model)


def test_a_model_deleted_in_the_middle_takes_its_thread_and_files_with_it(large_file: Path) -> None:
    model = stream_large(large_file)
    there = weakref.ref(model)
    del model
    wait_for_no_threads()
    gc.collect()
    assert there() is None
    assert descriptors_of(large_file) == mappings_of(large_file) == 0


def test_threads_that_run_forward_while_it_arrives(large_file: Path) -> None:
    expected_model = on_meta(n_blocks=N_LARGE)
    fastload.load_model(expected_model, large_file, dtype=torch.float32)
    expected = output(expected_model)
    model = stream_large(large_file)
    found: list[torch.Tensor] = []
    running = [threading.Thread(target=lambda: found.append(output(model))) for _ in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert [same_bytes(one, expected) for one in found] == [True] * 3


def test_many_loads_at_once(stack_file: Path) -> None:
    models = [stream_stack(stack_file) for _ in range(8)]
    outputs = [output(model) for model in models]
    assert all(same_bytes(one, outputs[0]) for one in outputs)


def test_files_may_be_deleted_once_all_is_there(stack_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(stack_file, tmp_path))
    model = stream_stack(path)
    fastload.wait(model)
    path.unlink()
    assert same_bytes(output(model), output(stream_stack(stack_file)))
