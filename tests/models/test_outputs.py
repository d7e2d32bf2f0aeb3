"""Outputs are a dict, a tuple and an object, whichever way they are made, copied or taken apart."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import transformers.modeling_outputs
from torch.utils import _pytree as pytree
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

from fastload.models import outputs
from fastload.models.outputs import MaskedLMOutput, ModelOutput

NAMES = [name for name in outputs.__all__ if name.endswith(("Output", "Attentions"))]
COMMON = {"ClassifierOutput", "ModelOutput"}


def some() -> MaskedLMOutput:
    return MaskedLMOutput(logits=torch.arange(3.0), hidden_states=(torch.zeros(2), torch.ones(2)))


def equal(first: ModelOutput, second: ModelOutput) -> bool:
    if type(first) is not type(second) or list(first) != list(second):
        return False
    leaves = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(torch.equal(a, b) for a, b in leaves)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COMMON])
def test_fields_are_those_of_transformers_in_the_same_order(name: str) -> None:
    theirs = getattr(transformers.modeling_outputs, name, BertForPreTrainingOutput)
    assert theirs.__name__ == name
    assert getattr(outputs, name)._fields == tuple(field.name for field in dataclasses.fields(theirs))


def test_a_value_is_found_by_name_number_and_attribute() -> None:
    output = some()
    assert output.logits is output["logits"] is output[0] is output.to_tuple()[0]
    assert output[1] is output.hidden_states
    assert output[:1] == (output.logits,)
    assert list(output) == ["logits", "hidden_states"]


def test_fields_that_are_none_are_left_out() -> None:
    output = some()
    assert output.loss is None
    assert "loss" not in output
    assert len(output) == len(output.to_tuple()) == 2
    assert output.get("loss", 1) == 1
    with pytest.raises(KeyError):
        output["loss"]


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="no field 'logit'"):
        MaskedLMOutput(logit=torch.zeros(1))
    with pytest.raises(AttributeError, match="no field 'logit'"):
        _ = some().logit


def test_a_field_set_late_has_its_place() -> None:
    output = some()
    output.attentions = (torch.zeros(1),)
    output["loss"] = torch.ones(())
    assert list(output) == ["loss", "logits", "hidden_states", "attentions"]
    output.loss = None
    assert list(output) == ["logits", "hidden_states", "attentions"]


def test_made_of_keywords_a_mapping_or_pairs() -> None:
    output = some()
    assert equal(MaskedLMOutput(dict(output)), output)
    assert equal(MaskedLMOutput((name, output[name]) for name in output), output)
    assert equal(MaskedLMOutput(**output), output)


def test_copies_and_pickles_are_the_same() -> None:
    output = some()
    for other in (copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert equal(other, output)
    assert copy.deepcopy(output).logits is not output.logits


def test_pytree_takes_it_apart_and_puts_it_together() -> None:
    output = some()
    leaves, spec = pytree.tree_flatten(output)
    assert len(leaves) == 3
    assert equal(pytree.tree_unflatten(leaves, spec), output)
    doubled = pytree.tree_map(lambda tensor: tensor * 2, output)
    assert torch.equal(doubled.logits, output.logits * 2)
    assert equal(pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec))), output)


def test_shown_with_its_fields() -> None:
    assert repr(MaskedLMOutput(logits=1)) == "MaskedLMOutput(loss=None, logits=1, hidden_states=None, attentions=None)"
