"""Native BERT gives the numbers that transformers gives, in every class and with every argument."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import transformers
from twins import HEADS, SMALL, assert_same, native_class, padding_mask, tokens, twins

from fastload.errors import ConfigError, OptionError
from fastload.models.bert import BertModel
from fastload.models.bert_config import BertConfig
from fastload.models.skeleton import skeleton

ENCODERS = ["BertModel", *HEADS]
ALL = [*ENCODERS, "BertLMHeadModel"]


def inputs_for(name: str, batch: int = 3, length: int = 9, kept: int = 5) -> dict[str, torch.Tensor]:
    """Tokens, the last text padded, the second half of each of the second kind."""
    segments = torch.zeros(batch, length, dtype=torch.long)
    segments[:, length // 2 :] = 1
    inputs = {
        "input_ids": tokens(batch, length),
        "attention_mask": padding_mask(batch, length, kept),
        "token_type_ids": segments,
    }
    if name == "BertForMultipleChoice":
        inputs = {key: torch.stack((value, value.flip(0)), dim=1) for key, value in inputs.items()}
    return inputs


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_buffers_have_the_same_names_in_the_same_order(name: str) -> None:
    fields = {**SMALL, "is_decoder": True, "add_cross_attention": True}
    theirs = getattr(transformers, name)(transformers.BertConfig(**fields))
    ours = native_class(name)(BertConfig(**fields))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    assert [key for key, _ in ours.named_buffers()] == [key for key, _ in theirs.named_buffers()]
    for (key, mine), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(mine, other), key
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize("name", ALL)
def test_forward_takes_the_same_arguments_in_the_same_order(name: str) -> None:
    theirs = inspect.signature(getattr(transformers, name).forward).parameters.values()
    ours = inspect.signature(native_class(name).forward).parameters.values()
    assert [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD
    ]


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_hidden_states_and_attentions_are_the_same(name: str) -> None:
    theirs, ours = twins(name, eager=True)
    inputs = inputs_for(name)
    asked = {"output_hidden_states": True, "output_attentions": True}
    assert_same(ours(**inputs, **asked), theirs(**inputs, **asked))


@pytest.mark.parametrize("name", ENCODERS)
def test_fused_attention_gives_the_same_outputs(name: str) -> None:
    theirs, ours = twins(name)
    inputs = inputs_for(name)
    assert_same(ours(**inputs), theirs(**inputs))
    del inputs["token_type_ids"], inputs["attention_mask"]
    assert_same(ours(**inputs), theirs(**inputs))


@pytest.mark.parametrize(
    ("name", "fields", "labels"),
    [
        ("BertForMaskedLM", {}, {"labels": tokens(3, 9)}),
        ("BertForPreTraining", {}, {"labels": tokens(3, 9), "next_sentence_label": torch.tensor([0, 1, 1])}),
        ("BertForPreTraining", {}, {"labels": tokens(3, 9)}),
        ("BertForNextSentencePrediction", {}, {"labels": torch.tensor([0, 1, 1])}),
        ("BertForSequenceClassification", {"num_labels": 1}, {"labels": torch.tensor([0.5, -1.0, 2.0])}),
        ("BertForSequenceClassification", {"num_labels": 4}, {"labels": torch.tensor([0, 3, 2])}),
        ("BertForSequenceClassification", {"num_labels": 2}, {"labels": torch.tensor([[0.0, 1], [1, 1], [0, 0]])}),
        (
            "BertForSequenceClassification",
            {"num_labels": 2, "problem_type": "regression"},
            {"labels": torch.tensor([[0.0, 1], [1, 1], [0, 0]])},
        ),
        ("BertForTokenClassification", {"num_labels": 5}, {"labels": tokens(3, 9) % 5}),
        (
            "BertForQuestionAnswering",
            {},
            # The last answer lies beyond the text.
            {"start_positions": torch.tensor([0, 3, 50]), "end_positions": torch.tensor([2, 4, 60])},
        ),
        ("BertForQuestionAnswering", {}, {"start_positions": torch.tensor([0, 3, 5])}),
        ("BertForMultipleChoice", {}, {"labels": torch.tensor([0, 1, 1])}),
    ],
)
def test_loss_is_the_same(name: str, fields: dict[str, Any], labels: dict[str, torch.Tensor]) -> None:
    theirs, ours = twins(name, **fields)
    labels = dict(labels)
    if name in ("BertForMaskedLM", "BertForPreTraining", "BertForTokenClassification"):
        labels["labels"] = labels["labels"].clone()
        labels["labels"][:, :3] = -100
    inputs = inputs_for(name)
    expected = theirs(**inputs, **labels)
    outputs = ours(**inputs, **labels)
    assert_same(outputs, expected)
    assert list(outputs) == list(expected)


def test_gradients_are_the_same() -> None:
    theirs, ours = twins("BertForSequenceClassification", num_labels=4)
    inputs = inputs_for("BertForSequenceClassification")
    for model in (theirs, ours):
        model(**inputs, labels=torch.tensor([0, 3, 2])).loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new", "silu", "gelu_pytorch_tanh", "quick_gelu", "tanh"])
def test_activations_are_the_same(activation: str) -> None:
    theirs, ours = twins("BertForMaskedLM", hidden_act=activation)
    inputs = inputs_for("BertForMaskedLM")
    assert_same(ours(**inputs), theirs(**inputs))


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_act"):
        BertModel(BertConfig(**SMALL, hidden_act="gulu"))


# Inputs


def test_mask_hides_padding() -> None:
    _, ours = twins("BertModel")
    text = tokens(1, 5)
    padded = torch.cat((text, tokens(1, 4, seed=2)), dim=1)
    alone = ours(text).last_hidden_state
    hidden = ours(padded, attention_mask=padding_mask(1, 9, kept=5)).last_hidden_state[:, :5]
    torch.testing.assert_close(hidden, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("explicit", [False, True])
def test_masks_of_three_and_four_dimensions(explicit: bool) -> None:
    theirs, ours = twins("BertModel", eager=explicit)
    text = tokens(2, 6)
    allowed = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.4
    allowed |= torch.eye(6, dtype=torch.bool)
    added = torch.zeros(2, 1, 6, 6).masked_fill(~allowed[:, None], torch.finfo(torch.float32).min)
    expected = theirs(text, attention_mask=added).last_hidden_state
    for mask in (allowed, allowed.long(), allowed[:, None], allowed[:, None].long(), added):
        states = ours(text, attention_mask=mask, output_attentions=explicit).last_hidden_state
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


def test_a_mask_that_is_different_in_every_head() -> None:
    theirs, ours = twins("BertModel")
    mask = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    assert_same(ours(tokens(2, 6), attention_mask=mask), theirs(tokens(2, 6), attention_mask=mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_may_be_of_any_type(dtype: torch.dtype) -> None:
    _, ours = twins("BertModel")
    mask = padding_mask(2, 6, kept=3)
    assert_same(ours(tokens(2, 6), mask.to(dtype)), ours(tokens(2, 6), mask))


def test_a_text_that_is_all_padding_gives_no_nan() -> None:
    theirs, ours = twins("BertModel")
    mask = padding_mask(2, 6, kept=0)
    for asked in ({}, {"output_attentions": True}):
        assert ours(tokens(2, 6), mask, **asked).last_hidden_state.isfinite().all()
    assert_same(ours(tokens(2, 6), mask), theirs(tokens(2, 6), mask))


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5), (6,), (2, 1, 1, 6, 6)])
def test_a_mask_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    _, ours = twins("BertModel")
    with pytest.raises(ValueError, match=r"attention mask is \(batch, 6\)"):
        ours(tokens(2, 6), attention_mask=torch.ones(shape))


def test_embeddings_and_positions_in_place_of_tokens() -> None:
    theirs, ours = twins("BertModel")
    text, positions = tokens(2, 6), torch.tensor([[5, 4, 3, 2, 1, 0], [6, 7, 8, 9, 10, 11]])
    embedded = ours.get_input_embeddings()(text)
    expected = theirs(text, position_ids=positions)
    assert_same(ours(text, position_ids=positions), expected)
    assert_same(ours(inputs_embeds=embedded, position_ids=positions), expected)
    assert_same(ours(text, position_ids=positions[:1]), theirs(text, position_ids=positions[:1]))


def test_choices_may_be_embedded_too() -> None:
    theirs, ours = twins("BertForMultipleChoice")
    embedded = ours.get_input_embeddings()(tokens(2, 3, 6))
    assert_same(ours(inputs_embeds=embedded), theirs(inputs_embeds=embedded))


def test_either_tokens_or_embeddings_are_needed() -> None:
    _, ours = twins("BertModel")
    for inputs in ({}, {"input_ids": tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 24)}):
        with pytest.raises(ValueError, match="exactly one"):
            ours(**inputs)
    with pytest.raises(ValueError, match="exactly one"):
        twins("BertForMultipleChoice")[1]()


def test_more_tokens_than_positions_are_refused() -> None:
    _, ours = twins("BertModel")
    with pytest.raises(ValueError, match="33 tokens, where the model has 32 positions"):
        ours(tokens(1, 33))


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="output_attention"):
        twins("BertForMaskedLM")[1](tokens(1, 3), output_attention=True)


@pytest.mark.parametrize("name", ENCODERS)
def test_tuple_has_the_fields_in_order(name: str) -> None:
    theirs, ours = twins(name, eager=True)
    asked = {"output_hidden_states": True, "output_attentions": True, "return_dict": False}
    expected, found = (model(**inputs_for(name), **asked) for model in (theirs, ours))
    assert isinstance(found, tuple)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_config_says_what_is_returned() -> None:
    _, ours = twins("BertModel", output_hidden_states=True, return_dict=False)
    assert isinstance(ours(tokens(1, 3)), tuple)
    outputs = ours(tokens(1, 3), return_dict=True)
    assert len(outputs.hidden_states) == SMALL["num_hidden_layers"] + 1
    assert ours(tokens(1, 3), return_dict=True, output_hidden_states=False).hidden_states is None
    ours.config.output_attentions = True
    assert len(ours(tokens(1, 3), return_dict=True).attentions) == SMALL["num_hidden_layers"]


def test_without_pooler() -> None:
    theirs = transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False).eval()
    ours = BertModel(BertConfig(**SMALL), add_pooling_layer=False).eval()
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours(tokens(2, 6)), theirs(tokens(2, 6)))
    assert ours(tokens(2, 6)).pooler_output is None


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 0}, {"chunk_size_feed_forward": 3}, {"pad_token_id": None}])
def test_unusual_configs_give_the_same(fields: dict[str, Any]) -> None:
    theirs, ours = twins("BertForMaskedLM", **fields)
    assert_same(ours(tokens(2, 9)), theirs(tokens(2, 9)))


def test_eager_attention_is_the_same_as_fused() -> None:
    _, fused = twins("BertModel")
    _, eager = twins("BertModel", attn_implementation="eager")
    inputs = inputs_for("BertModel")
    assert_same(eager(**inputs), fused(**inputs))
    with pytest.raises(OptionError, match="sdpa or eager"):
        BertModel(BertConfig(attn_implementation="flash_attention_2"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_half_precision_runs_and_gives_the_same(name: str, dtype: torch.dtype) -> None:
    theirs, ours = twins(name)
    inputs = inputs_for(name)
    outputs = ours.to(dtype)(**inputs)
    assert outputs[0].dtype is dtype
    assert_same(outputs, theirs.to(dtype)(**inputs), tolerance=2e-2)


def test_dropout_works_in_training_only() -> None:
    _, ours = twins("BertModel", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    text = tokens(2, 6)
    assert torch.equal(ours(text)[0], ours(text)[0])
    ours.train()
    for asked in ({}, {"output_attentions": True}):
        assert not torch.equal(ours(text, **asked)[0], ours(text, **asked)[0])


# The module


@pytest.mark.parametrize("name", ALL)
def test_copied_and_pickled_models_are_the_same_and_stay_tied(name: str) -> None:
    _, ours = twins(name)
    inputs = inputs_for(name)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(other(**inputs), ours(**inputs))
        head = other.get_output_embeddings()
        assert head is None or head.weight is other.get_input_embeddings().weight
        assert other.config == ours.config
        assert other.config is not ours.config


@pytest.mark.parametrize("name", ALL)
def test_built_on_meta_the_buffers_are_real_and_the_ties_hold(name: str) -> None:
    real = native_class(name)(BertConfig(**SMALL))
    for context in (torch.device("meta"), skeleton()):
        with context:
            model = native_class(name)(BertConfig(**SMALL))
        assert all(parameter.is_meta for parameter in model.parameters())
        for (key, buffer), (_, expected) in zip(model.named_buffers(), real.named_buffers(), strict=True):
            assert torch.equal(buffer, expected), key
        assert model.all_tied_weights_keys == real.all_tied_weights_keys
        for tied, source in model.all_tied_weights_keys.items():
            assert model.get_parameter(tied) is model.get_parameter(source)


def test_compiles_as_one_graph() -> None:
    _, ours = twins("BertForSequenceClassification")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    inputs = inputs_for("BertForSequenceClassification")
    with torch.no_grad():
        outputs = compiled(**inputs)
    assert_same(outputs, ours(**inputs))
    assert type(outputs) is type(ours(**inputs))
