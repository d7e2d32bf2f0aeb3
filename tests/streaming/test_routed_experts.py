"""Under a budget that does not hold all experts, those are read that the router chose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastload
from fastload import hf
from fastload.streaming.experts import RoutedExperts
from tests.cold import make_cold
from tests.conftest import same_bytes

Written = Callable[[str], Path]
LOADS: list[Any] = [
    pytest.param(hf.AutoModelForCausalLM.from_pretrained, id="transformers"),
    pytest.param(fastload.AutoModelForCausalLM.from_pretrained, id="native"),
]
# Three matrices between 64 and 256, of 4 bytes.
EXPERT_BYTES = 3 * 64 * 256 * 4
N_CHOSEN, N_LAYERS = 2, 4


def routed(model: torch.nn.Module) -> RoutedExperts:
    """What reads the experts of a model, found by its hooks."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    owners = [getattr(getattr(hook, "func", None), "__self__", None) for hook in hooks]
    return next(owner for owner in owners if isinstance(owner, RoutedExperts))


def step(model: Any, token: int) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[token]])).logits
    return found


@pytest.mark.parametrize("load", LOADS)
def test_one_token_reads_its_experts_and_those_foreseen(written: Written, load: Callable[..., Any]) -> None:
    file = written("moe") / "model.safetensors"
    expected = load(written("moe"))
    answers = [step(expected, token) for token in (5, 6, 5)]
    del expected
    model = load(written("moe"), memory_budget=4_000_000)
    experts = routed(model)
    make_cold(file)
    for token, answer in zip((5, 6, 5), answers, strict=True):
        before = experts.n_read_bytes
        assert same_bytes(step(model, token), answer)
        # Each of the three matrices may touch a page more than it fills.
        n_foreseen = -(-N_CHOSEN * 3 // 4) * (N_LAYERS - 1)
        assert experts.n_read_bytes - before <= (N_LAYERS * N_CHOSEN + n_foreseen) * (EXPERT_BYTES + 3 * 4096)
    assert experts.n_read_bytes > 0


@pytest.mark.parametrize("load", LOADS)
def test_experts_of_the_next_layer_are_asked_for_before_it_is_called(
    written: Written, load: Callable[..., Any]
) -> None:
    model = load(written("moe"), memory_budget=4_000_000)
    experts = routed(model)
    asked: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if name.endswith("experts"):
            # This hook runs after the one that brings the module's own experts.
            module.register_forward_pre_hook(
                lambda module, args, name=name: asked.update({name: {owner for owner, _ in experts._asked}})
            )
    step(model, 5)
    names = list(asked)
    assert [asked[name] for name in names] == [*({after} for after in names[1:]), set()]


@pytest.mark.parametrize("load", LOADS)
def test_an_expert_that_was_written_to_keeps_what_was_written(written: Written, load: Callable[..., Any]) -> None:
    models = [load(written("moe")), load(written("moe"), memory_budget=400_000)]
    for model in models:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.experts.down_proj.mul_(2)
    for token in (1, 2, 3, 1):
        assert same_bytes(step(models[0], token), step(models[1], token))
