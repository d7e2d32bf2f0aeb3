"""Decoders that classify: the same classes, outputs and losses as transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_decoders import FAMILIES, assert_close, each_family, pair, tokens
from transformers.models.auto import modeling_auto

import fastload
from fastload.models import registry

TASKS = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
EACH_HEAD = [
    (family, task)
    for family in FAMILIES
    for task, mapping in TASKS.items()
    if task != "AutoModelForCausalLM" and family in getattr(modeling_auto, mapping)
]


@each_family
def test_a_family_has_the_classes_that_transformers_has(family: str) -> None:
    for task, mapping in TASKS.items():
        expected = getattr(modeling_auto, mapping).get(family)
        if expected is None:
            with pytest.raises(fastload.FastloadError, match=f"{family} has no model for {task}"):
                registry.class_for(task, family)
            continue
        found = registry.class_for(task, family)
        assert found.__name__ == expected
        assert getattr(fastload, expected) is found
        assert found.base_model_prefix == getattr(transformers, expected).base_model_prefix


@pytest.mark.parametrize(("family", "task"), EACH_HEAD)
@torch.no_grad()
def test_outputs_are_those_of_transformers(family: str, task: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family, task, num_labels=3)
    ids = tokens(2, 9)
    # Padded on the left and on the right: a text ends with its last token that is no padding.
    ids[0, :3], ids[1, -4:] = 0, 0
    mask = (ids != 0).long()
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True)
    output = ours(ids, attention_mask=mask, output_hidden_states=True)
    assert set(output) >= set(expected) - {"past_key_values"}
    for name in set(expected) - {"past_key_values", "hidden_states"}:
        mine, other = output[name], expected[name]
        by_token = mine.shape[:2] == ids.shape
        assert_close(*((mine[mask.bool()], other[mask.bool()]) if by_token else (mine, other)))
    assert len(output.hidden_states) == len(expected.hidden_states)
    ours.save_pretrained(tmp_path / "again")
    again = getattr(transformers, task).from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids, attention_mask=mask)[0], expected[0])


LABELS: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "a class for a text": ("ForSequenceClassification", {"num_labels": 3}, {"labels": torch.tensor([2, 0])}),
    "a score": ("ForSequenceClassification", {"num_labels": 1}, {"labels": torch.tensor([0.5, -2.0])}),
    "several classes": ("ForSequenceClassification", {"num_labels": 3}, {"labels": torch.eye(3)[:2]}),
    "a class for a token": (
        "ForTokenClassification",
        {"num_labels": 3},
        {"labels": torch.tensor([[0, -100, 2, 1]] * 2)},
    ),
    "an answer": (
        "ForQuestionAnswering",
        {},
        {"start_positions": torch.tensor([0, 3]), "end_positions": torch.tensor([[2], [9]])},
    ),
}


@pytest.mark.parametrize(("task", "fields", "labels"), LABELS.values(), ids=LABELS)
@torch.no_grad()
def test_losses_are_those_of_transformers(
    task: str, fields: dict[str, Any], labels: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    theirs, ours = pair(tmp_path, "llama", f"AutoModel{task}", **fields)
    expected = theirs(tokens(2, 4), **labels)
    assert_close(ours(tokens(2, 4), **labels).loss, expected.loss)
    loss, *_ = ours(tokens(2, 4), **labels, return_dict=False)
    assert_close(loss, expected.loss)


@torch.no_grad()
def test_where_a_text_ends_without_a_token_for_padding(tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, "llama", "AutoModelForSequenceClassification", pad_token_id=None)
    assert_close(ours(tokens(1, 5)).logits, theirs(tokens(1, 5)).logits)
    embedded = ours.get_input_embeddings()(tokens(1, 5))
    assert_close(ours(inputs_embeds=embedded).logits, theirs(tokens(1, 5)).logits)
    with pytest.raises(ValueError, match="pad_token_id"):
        ours(tokens(2, 5))


@torch.no_grad()
def test_a_classifier_takes_its_base_model_from_a_language_model(tmp_path: Path) -> None:
    theirs, _ = pair(tmp_path, "qwen3")
    model, info = fastload.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert model.score.weight.shape == (5, 32)
    assert_close(model.model(tokens(1, 4))[0], theirs.model(tokens(1, 4))[0])
