"""A tensor parallel plan says what of each parameter a rank owns."""

from __future__ import annotations

from typing import Any

import pytest

from fastload.errors import OptionError
from fastload.models import registry
from fastload.models.skeleton import skeleton
from fastload.plan.boxes import Split, box_of
from fastload.plan.slots import describe_modules, walk_modules
from fastload.plan.tensor_parallel import STYLES, check_plan, expand_plan, splits_of

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
DECODERS = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"]


def built(family: str, task: str = "AutoModelForCausalLM", **fields: Any) -> Any:
    config = registry.config_class_for(family)
    known = {name: value for name, value in SMALL.items() if config().has_field(name)}
    with skeleton():
        return registry.class_for(task, family, file=None)(config(**{**known, **fields}))


def cuts(style: str, name: str, shape: tuple[int, ...]) -> tuple[Split, ...]:
    return splits_of({"layers.*.part": style}, f"layers.7.part.{name}", shape, 4, 3)


@pytest.mark.parametrize("style", ["colwise", "colwise_gather_output"])
def test_a_layer_cut_by_outputs_has_rows_of_weight_and_bias(style: str) -> None:
    assert cuts(style, "weight", (8, 6)) == (Split(0, 4, 3),)
    assert cuts(style, "bias", (8,)) == (Split(0, 4, 3),)


@pytest.mark.parametrize("style", ["rowwise", "rowwise_split_input"])
def test_a_layer_cut_by_inputs_has_columns_of_the_weight_and_the_whole_bias(style: str) -> None:
    assert cuts(style, "weight", (8, 6)) == (Split(1, 4, 3),)
    assert cuts(style, "bias", (8,)) == ()


def test_embeddings_are_cut_by_tokens_or_by_features() -> None:
    assert cuts("embedding_rowwise", "weight", (8, 6)) == (Split(0, 4, 3),)
    assert cuts("embedding_colwise", "weight", (8, 6)) == (Split(1, 4, 3),)


def test_stacked_experts_are_cut_by_their_number() -> None:
    assert cuts("experts", "gate_up_proj", (8, 6, 4)) == (Split(0, 4, 3),)


@pytest.mark.parametrize("style", ["replicate", "replicated_with_grad_allreduce"])
def test_what_is_replicated_is_not_cut(style: str) -> None:
    assert cuts(style, "weight", (8,)) == ()


def test_a_parameter_that_no_pattern_fits_is_whole() -> None:
    assert splits_of({"layers.*.part": "colwise"}, "layers.7.other.weight", (8, 6), 4, 3) == ()


def test_a_star_is_one_part_of_a_name() -> None:
    assert expand_plan({"*.b": "colwise"}, ["a.b", "a.a.b", "b", "c.b"]) == {"a.b": "colwise", "c.b": "colwise"}


def test_the_last_pattern_that_fits_counts() -> None:
    plan = {"layers.*.up": "colwise", "layers.1.up": "replicate"}
    assert expand_plan(plan, ["layers.0.up", "layers.1.up"]) == {"layers.0.up": "colwise", "layers.1.up": "replicate"}


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown style(.|\n)*rowwise(.|\n)*'diagonal'"):
        splits_of({"up": "diagonal"}, "up.weight", (8, 6), 4, 3)
    with pytest.raises(OptionError, match=r"'diagonal'"):
        check_plan({"up": "diagonal"}, ["up"])


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match=r"fits no module(.|\n)*layers\.\*\.upp(.|\n)*layers\.\*\.up"):
        check_plan({"layers.*.upp": "colwise"}, ["", "layers", "layers.0", "layers.0.up"])


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_is_cut_but_for_norms_and_routers(family: str) -> None:
    model = built(family)
    plan = model.tp_plan
    check_plan(plan, walk_modules(model))
    assert set(plan.values()) <= set(STYLES)
    slots = describe_modules(walk_modules(model)).values()
    whole = {slot.fqn for slot in slots if slot.persistent and not splits_of(plan, slot.fqn, slot.shape, 2, 0)}
    assert all("norm" in fqn or fqn.endswith("mlp.gate.weight") for fqn in whole)


@pytest.mark.parametrize("family", DECODERS)
def test_the_parts_of_all_ranks_are_the_model(family: str) -> None:
    model = built(family)
    for slot in describe_modules(walk_modules(model)).values():
        parts = [splits_of(model.tp_plan, slot.fqn, slot.shape, 4, part) for part in range(4)]
        if parts[0]:
            [dim] = {split.dim for part in parts for split in part}
            boxes = [box_of(slot.shape, part) for part in parts]
            assert [box.offset[dim] for box in boxes] == [number * boxes[0].shape[dim] for number in range(4)]
            assert sum(box.shape[dim] for box in boxes) == slot.shape[dim]


@pytest.mark.parametrize("family", DECODERS)
def test_a_head_is_cut_as_the_embeddings_that_it_may_be_tied_to(family: str) -> None:
    model = built(family)
    names = "lm_head.weight", "model.embed_tokens.weight"
    head, embeddings = (splits_of(model.tp_plan, name, (64, 32), 4, 1) for name in names)
    assert head == embeddings == (Split(0, 4, 1),)


def test_layers_with_and_without_experts_have_both_plans() -> None:
    mixed = built("qwen3_moe", mlp_only_layers=[0])
    check_plan(mixed.tp_plan, walk_modules(mixed))
    assert {"model.layers.*.mlp.experts", "model.layers.*.mlp.up_proj"} <= mixed.tp_plan.keys()
    assert "model.layers.*.mlp.up_proj" not in built("qwen3_moe").tp_plan


def test_a_model_without_a_head_has_its_own_names() -> None:
    model = built("llama", "AutoModel")
    check_plan(model.tp_plan, walk_modules(model))
    assert "embed_tokens" in model.tp_plan


@pytest.mark.parametrize("fields", [{}, {"is_decoder": True, "add_cross_attention": True}])
def test_a_bert_is_cut_in_its_blocks(fields: dict[str, Any]) -> None:
    model = built("bert", "AutoModelForMaskedLM", **fields)
    check_plan(model.tp_plan, walk_modules(model))
    assert model.tp_plan["bert.encoder.layer.*.attention.self.query"] == "colwise"
    assert any("crossattention" in pattern for pattern in model.tp_plan) == bool(fields)
