"""How the steps go on: nothing larger is made from step to step, and the host may be a step behind a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastload
from fastload.models.generation.decoding import Decoding
from tests.models.generation.causal import prompts, save_small


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A small Llama."""
    return fastload.AutoModelForCausalLM.from_pretrained(save_small(tmp_path))


@pytest.mark.parametrize("n_new", [1, 2, 30])
@pytest.mark.parametrize("ends_at", [None, 0, 3])
def test_a_host_that_is_a_step_behind_gets_the_same_texts(model: Any, n_new: int, ends_at: int | None) -> None:
    tokens, mask = prompts(9, 3)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": n_new, "return_dict_in_generate": True}
    options["output_scores"] = True
    if ends_at is not None:
        made = model.generate(tokens, attention_mask=mask, max_new_tokens=30)
        options["eos_token_id"] = made[:, 9 + ends_at].tolist()
    expected = model.generate(tokens, **options)
    late: Decoding = model._begin(tokens, **options)
    # As on a GPU: a step is launched before the one before it is looked at.
    late._lag = 1
    arrived = list(late.run())
    found: Any = late.result()
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert len(found.scores) == len(expected.scores) == len(arrived)
    assert torch.equal(torch.stack(arrived, 1), found.sequences[:, 9:])


class Largest(TorchDispatchMode):
    """Notes the largest storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.n_bytes = max(self.n_bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3, "do_sample": True, "top_p": 0.9}], ids=str)
def test_a_step_makes_nothing_larger_than_the_step_before(model: Any, options: dict[str, Any]) -> None:
    decoding: Decoding = model._begin(prompts(5)[0], max_new_tokens=40, **options)
    sizes = []
    steps = decoding.run()
    while True:
        with Largest() as largest:
            if next(steps, None) is None:
                break
        sizes.append(largest.n_bytes)
    assert len(sizes) == 40
    # The first step reads the prompt.
    assert len(set(sizes[1:])) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"eos_token_id": [3, 4, 5]}, {"repetition_penalty": 1.3}], ids=str)
def test_a_gpu_makes_the_same_texts_and_is_not_waited_for(model: Any, options: dict[str, Any]) -> None:
    tokens, _ = prompts(9, 9)
    expected = model.generate(tokens, max_new_tokens=20, **options)
    decoding: Decoding = model.to("cuda")._begin(tokens, max_new_tokens=20, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in decoding.run():
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(decoding.tokens.cpu(), expected)
