"""Experts: files hold them one by one, the model together; only those that are chosen are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_decoders import WITH_EXPERTS, assert_close, pair, their_model, tokens

import fastload
from fastload.errors import KeyMatchError
from tests.conftest import same_bytes

each_family = pytest.mark.parametrize("family", WITH_EXPERTS)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors checkpoint."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a checkpoint of one file."""
    save_file(change(stored(folder)), folder / "model.safetensors", {"format": "pt"})


def assert_same_state(ours: Any, theirs: Any) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(same_bytes(mine[name], other[name]) for name in other)


@each_family
def test_files_of_single_experts_become_fused_parameters(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    assert sum("experts.0." in key for key in stored(tmp_path)) == 9
    assert_same_state(ours, theirs)
    actions = fastload.report(ours).bytes_by_action
    assert "gather" not in actions
    n_experts, doubled, size = ours.model.layers[0].mlp.experts.gate_up_proj.shape
    inner = doubled // 2
    assert ours.model.layers[0].mlp.experts.down_proj.shape == (n_experts, size, inner)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_layers_experts_may_lie_in_several_shards(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = their_model(family)
    theirs.save_pretrained(tmp_path, max_shard_size="9KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    of_layer = {shard for key, shard in index.items() if ".layers.1." in key and ".experts." in key}
    assert len(of_layer) > 2
    ours = fastload.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, strict=True)
    assert_same_state(ours, theirs.to(dtype))


@each_family
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@torch.no_grad()
def test_a_save_has_the_names_of_the_family_and_is_read_by_transformers(
    family: str, safe: bool, tmp_path: Path
) -> None:
    theirs, ours = pair(tmp_path / "theirs", family)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="15KB", safe_serialization=safe)
    if safe:
        expected, written = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
        assert written.keys() == expected.keys()
        assert all(same_bytes(written[key], expected[key]) for key in expected)
    # transformers reads a .bin of single experts as well.
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_state(again, theirs)
    mine = fastload.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", strict=True)
    assert_same_state(mine, theirs)


@each_family
def test_what_is_saved_is_not_copied_first(family: str, tmp_path: Path) -> None:
    _, ours = pair(tmp_path, family)
    homes = {tensor.untyped_storage().data_ptr() for tensor in ours.state_dict().values()}
    pieces = ours._as_in_files(ours.state_dict())
    assert len(pieces) > len(ours.state_dict())
    assert {tensor.untyped_storage().data_ptr() for tensor in pieces.values()} == homes
    assert all(tensor.is_contiguous() for tensor in pieces.values())


@each_family
def test_a_save_over_its_own_files(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    with torch.no_grad():
        ours.model.layers[0].mlp.experts.down_proj[2].mul_(2)
        theirs.model.layers[0].mlp.experts.down_proj[2].mul_(2)
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_same_state(fastload.AutoModelForCausalLM.from_pretrained(tmp_path, strict=True), theirs)


@each_family
def test_files_that_are_fused_already_load_too(family: str, tmp_path: Path) -> None:
    theirs, _ = pair(tmp_path, family)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    ours = fastload.AutoModelForCausalLM.from_pretrained(tmp_path, strict=True)
    assert_same_state(ours, theirs)
    assert fastload.report(ours).bytes_by_action.keys() == {"map"}


def test_old_and_new_names_of_mixtral_load(tmp_path: Path) -> None:
    theirs, _ = pair(tmp_path, "mixtral")
    assert all("block_sparse_moe" in key for key in stored(tmp_path) if "experts" in key or ".gate." in key)
    rewritten(tmp_path, lambda old: {key.replace("block_sparse_moe", "mlp"): old[key] for key in old})
    assert_same_state(fastload.AutoModelForCausalLM.from_pretrained(tmp_path, strict=True), theirs)


@each_family
@pytest.mark.parametrize("base_first", [True, False], ids=["base into head", "head into base"])
def test_the_base_models_prefix_may_be_there_or_not(family: str, base_first: bool, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    if base_first:
        ours.model.save_pretrained(tmp_path / "base")
        model, info = fastload.AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
        assert info["missing_keys"] == {"lm_head.weight"}
        assert_same_state(model.model, theirs.model)
        base = transformers.AutoModel.from_pretrained(tmp_path / "base")
        assert_same_state(base, theirs.model)
    else:
        model, info = fastload.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert info["unexpected_keys"] == {"lm_head.weight"}
        assert_same_state(model, theirs.model)


@each_family
def test_an_expert_that_is_missing_is_an_error_that_names_the_layer(family: str, tmp_path: Path) -> None:
    pair(tmp_path, family)
    lost = re.compile(r"layers\.1\..*experts\.2\.(w1|gate_proj)")
    rewritten(tmp_path, lambda old: {key: old[key] for key in old if not lost.search(key)})
    with pytest.raises(KeyMatchError, match=r"layers\.1\..*experts\.gate_up_proj"):
        fastload.AutoModelForCausalLM.from_pretrained(tmp_path)


@each_family
def test_a_config_of_other_sizes_is_an_error(family: str, tmp_path: Path) -> None:
    pair(tmp_path, family)
    with pytest.raises(KeyMatchError, match=r"experts\.gate_up_proj"):
        fastload.AutoModelForCausalLM.from_pretrained(tmp_path, num_local_experts=3)


@each_family
@torch.no_grad()
def test_one_token_and_many_get_the_same_from_their_experts(family: str, tmp_path: Path) -> None:
    _, ours = pair(tmp_path, family)
    states = torch.randn(2, 9, ours.config.hidden_size)
    block = ours.model.layers[1].mlp
    single = [[block(states[row : row + 1, at : at + 1], None) for at in range(9)] for row in range(2)]
    assert_close(block(states, None), torch.cat([torch.cat(row, dim=1) for row in single]))


@each_family
@torch.no_grad()
def test_experts_that_are_not_chosen_are_not_read(family: str, tmp_path: Path) -> None:
    _, ours = pair(tmp_path, family)
    experts = ours.model.layers[0].mlp.experts
    weights, states = torch.tensor([[0.25, 0.75]]), torch.randn(3, ours.config.hidden_size)
    chosen = torch.tensor([[1, 3]])
    expected = experts(states, chosen.repeat(3, 1), weights.repeat(3, 1))
    for unused in (0, 2):
        experts.gate_up_proj[unused] = experts.down_proj[unused] = torch.nan
    assert torch.equal(experts(states, chosen.repeat(3, 1), weights.repeat(3, 1)), expected)
    assert_close(experts(states[:1], chosen, weights), expected[:1])


@each_family
@pytest.mark.parametrize("padded", [False, True])
def test_routers_tell_what_they_chose_and_how_unevenly(family: str, padded: bool, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 1 - int(padded)
    inputs = {"input_ids": tokens(2, 7), "attention_mask": mask, "labels": tokens(2, 7, seed=3)}
    expected, output = (model(**inputs, output_router_logits=True) for model in (theirs, ours))
    # What a token of padding sees is nobody's business.
    kept = mask.flatten().bool()
    for mine, other in zip(output.router_logits, expected.router_logits, strict=True):
        assert_close(mine[kept], other[kept])
    assert_close(output.aux_loss, expected.aux_loss)
    assert output.router_logits[0].shape[0] == 14
    ours.config.output_router_logits = True
    assert_close(ours(**inputs).loss, output.loss)
    ours.config.output_router_logits = False
    plain = ours(**inputs)
    assert plain.router_logits is None
    assert_close(output.loss - plain.loss, ours.config.router_aux_loss_coef * output.aux_loss)


def test_noise_of_the_router_is_for_training_only(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, "mixtral", router_jitter_noise=0.5)
    ids = tokens(1, 5)
    assert torch.equal(ours(ids).logits, ours(ids).logits)
    ours.train()
    assert not torch.equal(ours(ids).logits, ours(ids).logits)
