"""The order of use, told by names."""

from __future__ import annotations

import random

import pytest

from fastload.dtypes import DTYPES
from fastload.formats.order import in_order_of_use
from fastload.formats.specs import Region, TensorSpec


def ordered(keys: list[str]) -> list[str]:
    specs = [TensorSpec(key, DTYPES["F32"], (1,), Region("f", 4 * i, 4)) for i, key in enumerate(keys)]
    random.Random(0).shuffle(specs)
    return [spec.key for spec in in_order_of_use(specs)]


def test_embeddings_come_first_layers_by_number_and_the_head_last() -> None:
    in_file = [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.q",
        "model.layers.10.q",
        "model.layers.2.q",
        "model.norm",
    ]
    assert ordered(in_file) == [
        "model.embed_tokens",
        "model.layers.0.q",
        "model.layers.2.q",
        "model.layers.10.q",
        "lm_head",
        "model.norm",
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("encoder.layer.11.a", "decoder.layer.0.a"),
        ("vision_tower.blocks.7.a", "language_model.layers.0.a"),
        ("transformer.wte.weight", "transformer.h.0.attn.weight"),
        ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.LayerNorm.weight"),
        ("h.9.a", "h.10.a"),
        ("layers.1.mlp.experts.63.up", "layers.2.mlp.experts.0.up"),
    ],
)
def test_what_is_used_first(first: str, second: str) -> None:
    assert ordered([first, second]) == ordered([second, first]) == [first, second]


def test_within_a_layer_the_order_of_the_file_is_kept() -> None:
    assert ordered(["layers.0.z", "layers.0.experts.10.a", "layers.0.experts.2.a", "layers.0.b"])[0] == "layers.0.z"
