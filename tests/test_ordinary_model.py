"""A loaded model is an ordinary model, although its parameters stand on a mapped file."""

from __future__ import annotations

import copy
import hashlib
import io
import multiprocessing
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastload
from tests.conftest import same_bytes
from tests.test_from_pretrained import TINY, state_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    fastload.BertForSequenceClassification(fastload.BertConfig(**TINY)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> Any:
    return fastload.BertForSequenceClassification.from_pretrained(folder)


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.tensor([0, 1])}


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits  # type: ignore[no-any-return]


def file_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_it_trains_and_the_file_stays_as_it_was(folder: Path, model: Any, optimiser: Any) -> None:
    before = file_digest(folder)
    reference = fastload.BertForSequenceClassification(model.config)
    reference.load_state_dict(state_of(model))
    losses: dict[str, list[float]] = {"mapped": [], "ordinary": []}
    for name, trained in (("mapped", model), ("ordinary", reference)):
        steps = optimiser(trained.eval().parameters(), lr=0.05)
        for _ in range(4):
            loss = trained(**batch()).loss
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses[name].append(loss.item())
    assert losses["mapped"] == losses["ordinary"]
    assert losses["mapped"][-1] < losses["mapped"][0]
    assert file_digest(folder) == before


def test_training_one_copy_leaves_another_load_of_the_file_alone(folder: Path, model: Any) -> None:
    other = fastload.BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias.fill_(9)
    assert other.classifier.bias.abs().max() == 0


def test_it_copies(model: Any) -> None:
    expected = outputs(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert torch.equal(outputs(copied), expected)


def test_copying_one_layer_copies_no_more_than_that_layer(model: Any) -> None:
    layer = copy.deepcopy(model.classifier)
    assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes


def test_it_pickles(model: Any) -> None:
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(outputs(again), outputs(model))


def test_a_saved_parameter_is_as_large_as_itself(model: Any) -> None:
    buffer = io.BytesIO()
    torch.save(model.classifier.bias, buffer)
    assert buffer.tell() < 4096
    buffer.seek(0)
    assert same_bytes(torch.load(buffer, weights_only=True), model.classifier.bias)


def test_torch_saves_and_loads_its_state_dict(model: Any) -> None:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert all(same_bytes(loaded[name], tensor) for name, tensor in state_of(model).items())


def test_it_moves_between_types_and_devices(model: Any) -> None:
    expected = outputs(model)
    assert outputs(model.to(torch.float64)).dtype == torch.float64
    torch.testing.assert_close(outputs(model.float()), expected)
    shapes = model.to("meta").state_dict()
    assert all(tensor.is_meta for tensor in shapes.values())


def _logits_in_a_child(model: Any, connection: Any) -> None:
    with torch.no_grad():
        model.classifier.bias.add_(1)
        connection.send(model(input_ids=batch()["input_ids"]).logits.tolist())
    connection.close()


def test_it_shares_memory_with_a_spawned_process(model: Any) -> None:
    expected = outputs(model) + 1
    model.share_memory()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_logits_in_a_child, args=(model, there))
    process.start()
    found = torch.tensor(here.recv())
    process.join()
    torch.testing.assert_close(found, expected)
    assert model.classifier.bias.tolist() == [1.0, 1.0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_a_forked_child_has_the_weights_and_keeps_its_writes_to_itself(model: Any) -> None:
    expected = outputs(model)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of the test runner; the child only computes
        child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        with torch.no_grad():
            model.classifier.bias.add_(5)
        os.write(writer, pickle.dumps(outputs(model).tolist()))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = torch.tensor(pickle.loads(pipe.read()))
    os.waitpid(child, 0)
    torch.testing.assert_close(found, expected + 5)
    assert torch.equal(outputs(model), expected)


def test_it_compiles(model: Any) -> None:
    expected = outputs(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled), expected)


def test_it_takes_hooks_parametrisations_and_other_weights(folder: Path, model: Any) -> None:
    calls = []
    model.classifier.register_forward_hook(lambda *_: calls.append(1))
    outputs(model)
    assert calls == [1]
    state = {name: torch.zeros_like(tensor) for name, tensor in state_of(model).items()}
    model.load_state_dict(state)
    assert outputs(model).abs().max() == 0
    nn.utils.parametrizations.weight_norm(model.classifier)


def test_its_parameters_outlive_everything_else(folder: Path) -> None:
    weight = fastload.BertModel.from_pretrained(folder).embeddings.word_embeddings.weight
    expected = fastload.load_state_dict(folder)["bert.embeddings.word_embeddings.weight"]
    for path in folder.iterdir():
        path.unlink()
    assert same_bytes(weight, expected)


def test_layers_share_nothing_but_the_config(model: Any) -> None:
    first, second = model.bert.encoder.layer[0], model.bert.encoder.layer[1]
    shared = {id(m) for m in first.modules()} & {id(m) for m in second.modules()}
    assert shared == set()
    first.register_forward_hook(lambda *_: None)
    first.attention.training = True
    assert len(second._forward_hooks) == 0
    assert not second.attention.training
