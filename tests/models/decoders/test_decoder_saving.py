"""Decoders saved by fastload and loaded by transformers; heads and base models out of each other's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from small_decoders import assert_close, each_family, pair, their_model, tokens

import fastload
from tests.conftest import same_bytes


@each_family
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@torch.no_grad()
def test_transformers_reads_what_is_saved(family: str, safe: bool, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path / "theirs", family)
    ours.save_pretrained(tmp_path / "ours", safe_serialization=safe, max_shard_size="20KB")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(theirs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(again(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
    mine = fastload.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", strict=True)
    assert torch.equal(mine(tokens(2, 9)).logits, ours(tokens(2, 9)).logits)


@each_family
def test_the_files_of_both_have_the_same_keys_and_bytes(family: str, tmp_path: Path) -> None:
    _, ours = pair(tmp_path / "theirs", family)
    ours.save_pretrained(tmp_path / "ours")
    written, expected = (fastload.open_checkpoint(tmp_path / name) for name in ("ours", "theirs"))
    assert set(written) == set(expected)
    assert all(same_bytes(written[key], expected[key]) for key in expected)


@each_family
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_as_the_config_says(family: str, tied: bool, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family, tie_word_embeddings=tied)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    ours.save_pretrained(tmp_path / "again")
    assert ("lm_head.weight" in fastload.open_checkpoint(tmp_path / "again")) is not tied


@each_family
@torch.no_grad()
def test_a_base_model_becomes_a_head_and_back(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path / "head", family, tie_word_embeddings=False)
    base, info = fastload.AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"}
    ids = tokens(2, 7)
    assert_close(base(ids).last_hidden_state, theirs.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    head, info = fastload.AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    head.lm_head.weight.copy_(ours.lm_head.weight)
    assert_close(head(ids).logits, theirs(ids).logits)
    assert_close(transformers.AutoModel.from_pretrained(tmp_path / "base")(ids).last_hidden_state, base(ids)[0])


def test_a_config_whose_shapes_disagree_with_the_weights_is_an_error(tmp_path: Path) -> None:
    their_model("llama").save_pretrained(tmp_path)
    with pytest.raises(fastload.FastloadError, match=r"gate_proj\.weight: \[48, 32\] in the file, \[40, 32\]"):
        fastload.AutoModelForCausalLM.from_pretrained(tmp_path, intermediate_size=40)


@each_family
@torch.no_grad()
def test_a_model_can_be_cut_short(family: str, tmp_path: Path) -> None:
    their_model(family).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    ours = fastload.AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(ours.model.layers) == 2
    assert_close(ours(tokens(1, 9)).logits, theirs(tokens(1, 9)).logits)
    ours.save_pretrained(tmp_path / "cut")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert_close(again(tokens(1, 9)).logits, theirs(tokens(1, 9)).logits)
