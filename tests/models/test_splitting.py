"""Options of a load over ranks, in a process that is no rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.errors import OptionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = fastload.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    fastload.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("how", [{"tp_plan": "auto"}, {"device_mesh": "any"}])
@pytest.mark.parametrize("named_by", [fastload.AutoModelForCausalLM, fastload.LlamaForCausalLM])
def test_a_process_without_a_group_is_told_of_torchrun(folder: Path, named_by: Any, how: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=r"process group(.|\n)*torchrun"):
        named_by.from_pretrained(folder, **how)


@pytest.mark.parametrize(
    "other",
    [
        {"device_map": "auto"},
        {"max_memory": {"cpu": "1GB"}},
        {"lazy": True},
        {"stream": True},
        {"memory_budget": "1GB"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_parts_go_to_the_ranks_and_arrive_with_the_load(folder: Path, other: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=rf"exclude each other(.|\n)*{next(iter(other))}"):
        fastload.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", **other)


def test_a_model_that_is_whole_says_how_it_would_be_split(folder: Path) -> None:
    model = fastload.LlamaForCausalLM.from_pretrained(folder)
    assert model.tp_size == 1
    assert model.tp_plan["model.layers.*.self_attn.q_proj"] == "colwise"
