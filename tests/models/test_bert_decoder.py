"""BERT as a decoder: the causal mask, the cache, and attention to another sequence."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from twins import CROSS, DECODER, SMALL, assert_same, native_class, padding_mask, tokens, twins

from fastload.errors import ConfigError
from fastload.models.bert import BertModel
from fastload.models.bert_config import BertConfig


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("mask", [None, padding_mask(2, 7, kept=4), padding_mask(2, 7, kept=4).flip(1)])
def test_decoder_gives_the_same(mask: torch.Tensor | None, eager: bool) -> None:
    theirs, ours = twins("BertLMHeadModel", eager=eager, **DECODER)
    asked = {"output_hidden_states": True, "output_attentions": eager}
    labels = tokens(2, 7)
    labels[0, :3] = -100
    for extra in ({}, {"labels": labels}):
        inputs = {"input_ids": tokens(2, 7), "attention_mask": mask, **asked, **extra}
        assert_same(ours(**inputs), theirs(**inputs))


def test_no_token_sees_a_later_one() -> None:
    _, ours = twins("BertLMHeadModel", **DECODER)
    text, changed = tokens(1, 7), tokens(1, 7)
    changed[:, 5:] = 3
    before, after = ours(text).logits, ours(changed).logits
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("eager", [False, True])
def test_cache_gives_what_the_whole_text_gives(eager: bool) -> None:
    theirs, ours = twins("BertLMHeadModel", **DECODER, attn_implementation="eager" if eager else "sdpa")
    text, mask = tokens(2, 8), padding_mask(2, 8, kept=3).flip(1)
    whole = ours(text, attention_mask=mask, use_cache=False)
    assert whole.past_key_values is None
    past = None
    parts = []
    for begin, end in ((0, 4), (4, 5), (5, 8)):
        outputs = ours(text[:, begin:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True)
        past = outputs.past_key_values
        parts.append(outputs.logits)
    # What stands at padding is of no meaning: it depends on how many other tokens there were to look at.
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[seen], whole.logits[seen], rtol=1e-5, atol=1e-5)
    past = ours(text, attention_mask=mask).past_key_values
    expected = theirs(text, attention_mask=mask).past_key_values
    assert len(past) == SMALL["num_hidden_layers"]
    for (key, value), layer in zip(past, expected.layers, strict=True):
        torch.testing.assert_close(key, layer.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value, layer.values, rtol=1e-5, atol=1e-5)


def test_cache_without_a_mask() -> None:
    _, ours = twins("BertModel", **DECODER)
    text = tokens(2, 8)
    first = ours(text[:, :5])
    rest = ours(text[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest[0], ours(text)[0][:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "BertLMHeadModel"])
@pytest.mark.parametrize("eager", [False, True])
def test_cross_attention_gives_the_same(name: str, eager: bool) -> None:
    theirs, ours = twins(name, eager=eager, **CROSS)
    other = torch.randn(2, 5, SMALL["hidden_size"], generator=torch.Generator().manual_seed(4))
    for other_mask in (None, padding_mask(2, 5, kept=2)):
        inputs: dict[str, Any] = {
            "input_ids": tokens(2, 7),
            "attention_mask": padding_mask(2, 7, kept=4),
            "encoder_hidden_states": other,
            "encoder_attention_mask": other_mask,
            "output_attentions": eager,
            "use_cache": False,
        }
        assert_same(ours(**inputs), theirs(**inputs))


def test_cross_attention_with_a_cache() -> None:
    _, ours = twins("BertLMHeadModel", **CROSS)
    text, other = tokens(2, 6), torch.randn(2, 5, SMALL["hidden_size"])
    inputs = {"encoder_hidden_states": other, "encoder_attention_mask": padding_mask(2, 5, kept=3)}
    whole = ours(text, **inputs).logits
    first = ours(text[:, :4], **inputs)
    assert [len(layer) for layer in first.past_key_values] == [4] * SMALL["num_hidden_layers"]
    rest = ours(text[:, 4:], past_key_values=first.past_key_values, **inputs)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), dim=1), whole, rtol=1e-5, atol=1e-5)


def test_a_decoder_may_do_without_the_other_sequence() -> None:
    theirs, ours = twins("BertLMHeadModel", **CROSS)
    assert_same(ours(tokens(2, 6)), theirs(tokens(2, 6)))


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])])
def test_only_the_asked_for_tokens_are_scored(kept: int | torch.Tensor) -> None:
    theirs, ours = twins("BertLMHeadModel", **DECODER)
    assert_same(ours(tokens(2, 6), logits_to_keep=kept), theirs(tokens(2, 6), logits_to_keep=kept))


def test_masked_lm_takes_another_sequence_too() -> None:
    theirs, ours = twins("BertForMaskedLM", **CROSS)
    inputs = {"input_ids": tokens(2, 6), "encoder_hidden_states": torch.randn(2, 5, SMALL["hidden_size"])}
    assert_same(ours(**inputs), theirs(**inputs))


def test_cross_attention_that_the_config_lacks_is_named() -> None:
    _, ours = twins("BertModel", **DECODER)
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        ours(tokens(1, 3), encoder_hidden_states=torch.zeros(1, 2, SMALL["hidden_size"]))
    with pytest.raises(ConfigError, match="is_decoder"):
        BertModel(BertConfig(add_cross_attention=True))


def test_a_head_that_does_not_suit_the_config_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fastload"):
        native_class("BertLMHeadModel")(BertConfig(**SMALL))
        native_class("BertForMaskedLM")(BertConfig(**SMALL, **DECODER))
    assert [record.name for record in caplog.records] == ["fastload", "fastload"]
    assert "is_decoder" in caplog.text
