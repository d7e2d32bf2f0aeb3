"""What is done with a model after it was loaded: copies, pickles, casts, training, generation, other processes."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastload import hf
from tests.hf.families import build, model_class
from tests.hf.sides import assert_same_models

Written = Callable[..., Path]
TOKENS = torch.arange(10)[None]


@pytest.fixture(params=["llama", "qwen3_moe", "gpt2"])
def models(request: pytest.FixtureRequest, written: Written) -> tuple[Any, Any]:
    """A model as transformers loads it, and as fastload does."""
    folder = written(request.param, max_shard_size="20KB")
    with hf.enabled():
        found = model_class(request.param).from_pretrained(folder)
    return model_class(request.param).from_pretrained(folder), found


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def zeroed(model: Any) -> Any:
    model.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()})
    return model


def with_more_tokens(model: Any) -> Any:
    torch.manual_seed(0)
    model.resize_token_embeddings(120)
    return model


def trained(model: Any) -> Any:
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=0.01)
    torch.manual_seed(0)
    for _ in range(2):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


@pytest.mark.parametrize(
    "use",
    [
        copy.deepcopy,
        pickled,
        saved_by_torch,
        zeroed,
        with_more_tokens,
        trained,
        lambda model: model.to(torch.float64),
        lambda model: model.half().float(),
        lambda model: model.share_memory(),
        lambda model: model.requires_grad_(False).train(),
    ],
    ids=["deepcopy", "pickle", "torch.save", "load_state_dict", "resize", "train", "double", "half", "share", "freeze"],
)
def test_a_loaded_model_can_be_used_as_any_other(models: tuple[Any, Any], use: Callable[[Any], Any]) -> None:
    expected, found = map(use, models)
    assert type(found) is type(expected)
    assert_same_models(expected, found)


def test_nothing_is_left_on_a_loaded_model_that_transformers_does_not_leave(models: tuple[Any, Any]) -> None:
    modules = zip(models[0].modules(), models[1].modules(), strict=True)
    assert all(vars(expected).keys() == vars(found).keys() for expected, found in modules)
    parameters = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(vars(expected).keys() == vars(found).keys() for expected, found in parameters)


def test_the_same_text_is_generated(models: tuple[Any, Any]) -> None:
    expected, found = (model.generate(TOKENS[:, :4], max_new_tokens=6, do_sample=False) for model in models)
    assert torch.equal(found, expected)


def test_one_tensor_saved_is_as_large_as_it_is(models: tuple[Any, Any]) -> None:
    for parameter in models[1].parameters():
        file = io.BytesIO()
        torch.save(parameter.detach(), file)
        assert len(file.getvalue()) < parameter.nbytes + 2000


def test_a_process_that_is_forked_writes_into_memory_of_its_own(models: tuple[Any, Any]) -> None:
    expected, found = models
    process = os.fork()
    if process == 0:
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.zero_()
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    assert_same_models(expected, found)


def test_files_are_not_changed_by_their_model(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path, max_shard_size="20KB")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with hf.enabled():
        zeroed(trained(transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path)))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
