"""What all native models do: random weights, ties, sizes, and the questions one asks of them."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from twins import HEADS, SMALL, assert_same, native_class, tokens, twins

from fastload.errors import IncompleteModelError, OptionError
from fastload.models.base import PreTrainedModel
from fastload.models.bert import BertModel
from fastload.models.bert_config import BertConfig
from fastload.models.bert_heads import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification

LARGER = {**SMALL, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 500, "initializer_range": 0.05}


# Random weights


@pytest.mark.parametrize("name", ["BertModel", *HEADS])
def test_fresh_parameters_are_distributed_as_those_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    ours = native_class(name)(BertConfig(**LARGER))
    theirs = getattr(transformers, name)(transformers.BertConfig(**LARGER))
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if other.std(correction=0) == 0:
            assert torch.equal(mine, other), key
        else:
            error = 4 * 0.05 / mine.numel() ** 0.5
            assert abs(mine.mean()) < error, key
            assert abs(mine.std(correction=0) - 0.05) < 2 * error, key
    padding = ours.get_input_embeddings().weight[0]
    assert torch.equal(padding, torch.zeros_like(padding))


def test_weights_depend_on_the_seed_alone() -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(BertModel(BertConfig(**SMALL)))
    weights = [model.encoder.layer[2].output.dense.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_one_parameter_can_be_filled_alone() -> None:
    model = BertForMaskedLM(BertConfig(**LARGER))
    layer = model.bert.encoder.layer[0].output
    before = copy.deepcopy(model.state_dict())
    weight = torch.full_like(layer.dense.weight, 9.0)
    model.init_parameter(layer.dense, "weight", weight)
    assert abs(weight.std() - 0.05) < 0.01
    for module, name, value in (
        (layer.dense, "bias", 0.0),
        (layer.LayerNorm, "weight", 1.0),
        (layer.LayerNorm, "bias", 0.0),
        (model.cls.predictions, "bias", 0.0),
    ):
        tensor = torch.full_like(getattr(module, name), 9.0)
        model.init_parameter(module, name, tensor)
        assert torch.equal(tensor, torch.full_like(tensor, value))
    embedding = torch.full_like(model.get_input_embeddings().weight, 9.0)
    model.init_parameter(model.get_input_embeddings(), "weight", embedding)
    assert embedding[0].eq(0).all()
    assert embedding[1:].ne(9).all()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_parameter_no_rule_knows_is_an_error_that_says_so() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    class WithOdd(PreTrainedModel):
        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.odd = Odd()
            self.post_init()

    model = WithOdd(BertConfig())
    assert torch.equal(model.odd.scale, torch.ones(2))
    with pytest.raises(IncompleteModelError, match="scale of a Odd"):
        model.init_parameter(model.odd, "scale", model.odd.scale)


def test_weights_drawn_again_keep_ties_and_padding() -> None:
    model = BertForMaskedLM(BertConfig(**LARGER))
    embedding = model.get_input_embeddings().weight
    old = embedding.clone()
    model.init_weights()
    assert not torch.equal(embedding, old)
    assert embedding[0].eq(0).all()
    assert model.cls.predictions.decoder.weight is embedding


# Ties


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForPreTraining])
def test_head_is_tied_to_the_embeddings(kind: type[Any]) -> None:
    model = kind(BertConfig(**SMALL))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert model.get_output_embeddings() is model.cls.predictions.decoder


def test_config_can_untie() -> None:
    theirs, ours = twins("BertForMaskedLM", tie_word_embeddings=False)
    assert ours.all_tied_weights_keys == {}
    assert ours.get_output_embeddings().weight is not ours.get_input_embeddings().weight
    assert ours.num_parameters() == theirs.num_parameters()
    assert_same(ours(tokens(2, 6)), theirs(tokens(2, 6)))


def test_ties_can_be_made_again() -> None:
    model = BertForMaskedLM(BertConfig(**SMALL))
    model.set_input_embeddings(nn.Embedding(SMALL["vocab_size"], SMALL["hidden_size"]))
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# The vocabulary


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [80, 40])
def test_resized_as_transformers_does(size: int, tied: bool) -> None:
    theirs, ours = twins("BertForMaskedLM", tie_word_embeddings=tied)
    embeddings = ours.get_input_embeddings()
    parameter = embeddings.weight
    assert ours.resize_token_embeddings(size) is embeddings
    theirs.resize_token_embeddings(size)
    assert embeddings.weight is parameter
    assert ours.config.vocab_size == embeddings.num_embeddings == ours.get_output_embeddings().out_features == size
    text = tokens(2, 6) % 40
    assert_same(ours(text, labels=text), theirs(text, labels=text), tolerance=1e-3)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-3, atol=1e-3, msg=key)
    again = BertForMaskedLM(ours.config).eval()
    again.load_state_dict(ours.state_dict())
    assert_same(again(text), ours(text))


def test_size_is_rounded_up() -> None:
    model = BertModel(BertConfig(**SMALL))
    assert model.resize_token_embeddings(pad_to_multiple_of=64).num_embeddings == 64
    assert model.resize_token_embeddings(65, pad_to_multiple_of=8).num_embeddings == 72
    assert model.resize_token_embeddings().num_embeddings == 72
    with pytest.raises(OptionError, match="at least one token"):
        model.resize_token_embeddings(0)


def test_new_tokens_may_begin_at_random() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**LARGER))
    new = model.resize_token_embeddings(900, mean_resizing=False).weight[500:]
    assert abs(new.std() - 0.05) < 0.005


def test_a_resized_model_trains() -> None:
    model = BertForMaskedLM(BertConfig(**SMALL))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    text = tokens(2, 6)
    model(text, labels=text).loss.backward()
    model.resize_token_embeddings(100)
    optimiser.zero_grad()
    before = model.get_input_embeddings().weight.clone()
    model(text + 30, labels=text).loss.backward()
    optimiser.step()
    assert not torch.equal(model.get_input_embeddings().weight, before)


# Training


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    _, model = twins("BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.train()
    text, labels = tokens(2, 6), torch.tensor([0, 1])
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing is enable
        model.zero_grad()
        model(text, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_runs_layers_twice_and_keeps_no_cache() -> None:
    model = BertModel(BertConfig(**SMALL, is_decoder=True)).train()
    runs: list[int] = []
    model.encoder.layer[1].register_forward_pre_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable({"preserve_rng_state": False})
    outputs = model(tokens(2, 6), output_hidden_states=True)
    assert outputs.past_key_values is None
    outputs[0].sum().backward()
    assert len(runs) == 2


def test_a_small_model_learns() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**{**SMALL, "hidden_dropout_prob": 0.0}))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    text, labels = tokens(8, 6), torch.arange(8) % 2
    losses = []
    for _ in range(30):
        loss = model(text, labels=labels).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.2 * losses[0]


# Questions


@pytest.mark.parametrize("name", ["BertModel", *HEADS])
def test_counts_are_those_of_transformers(name: str) -> None:
    theirs, ours = twins(name)
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(exclude_embeddings=True)
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert ours.get_memory_footprint(return_buffers=False) == theirs.get_memory_footprint(return_buffers=False)
    for model in (ours, theirs):
        model.get_input_embeddings().requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)
    assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))
    assert ours.half().dtype is torch.float16


def test_base_model_is_the_model_without_its_head() -> None:
    model = BertForMaskedLM(BertConfig(**SMALL))
    assert model.base_model is model.bert
    assert model.bert.base_model is model.bert
    assert model.bert.get_output_embeddings() is None


def test_a_model_is_built_of_a_config_only() -> None:
    with pytest.raises(TypeError, match="from_pretrained"):
        BertModel("bert-base-uncased")


def test_from_config_copies_the_config_and_converts() -> None:
    config = BertConfig(**SMALL, dtype="bfloat16")
    model = BertModel._from_config(config)
    assert model.dtype is torch.bfloat16
    assert model.config == config
    assert model.config is not config
    model = BertModel._from_config(config, dtype="float16", attn_implementation="eager")
    assert (model.dtype, model.config.dtype) == (torch.float16, torch.float16)
    assert model.config.attn_implementation == "eager"
    assert config.dtype is torch.bfloat16
    assert BertModel._from_config(BertConfig(**SMALL)).dtype is torch.float32


def test_modules_kept_in_fp32_are_not_converted() -> None:
    class Careful(BertModel):
        _keep_in_fp32_modules = ["LayerNorm"]  # noqa: RUF012

    model = Careful._from_config(BertConfig(**SMALL), dtype=torch.float16)
    types = {key: parameter.dtype for key, parameter in model.named_parameters()}
    assert all(dtype is (torch.float32 if "LayerNorm" in key else torch.float16) for key, dtype in types.items())


def test_building_in_threads_leaves_the_default_dtype_alone() -> None:
    models: list[BertModel] = []
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    threads = [
        threading.Thread(
            target=lambda dtype=dtype: models.append(BertModel._from_config(BertConfig(**SMALL), dtype=dtype))
        )
        for dtype in dtypes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {model.dtype for model in models} == set(dtypes)
    assert all(len({parameter.dtype for parameter in model.parameters()}) == 1 for model in models)
    assert torch.get_default_dtype() is torch.float32
