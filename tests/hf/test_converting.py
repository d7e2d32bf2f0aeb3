"""Stacking, concatenating and chunking as rows of a plan: the tensors that transformers' operations make."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter
from transformers.modeling_utils import LoadStateDictConfig

import fastload
from fastload.hf.loading import loading_class
from tests.conformance.compare import tensor_state

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8]
PAGE_ELEMENTS = 4096 // 4


class HolderConfig(PreTrainedConfig):
    model_type = "fastload-holder"
    shapes: Any = None
    n_shards: int = 2


class Holder(PreTrainedModel):
    """A model of one block that has the parameters it is told to have."""

    config_class = HolderConfig
    base_model_prefix = "holder"

    def __init__(self, config: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList([nn.Module()])
        for name, shape in (config.shapes or {}).items():
            tensor = torch.empty(shape, dtype=dtype)
            self.blocks[0].register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        self.post_init()


def loaded(
    model_class: Any, files: Sequence[Path], shapes: Mapping[str, Any], dtype: torch.dtype, converter: Any
) -> Any:
    """A model on meta, filled one way or the other, and what that says."""
    with torch.device("meta"):
        model = Holder(HolderConfig(shapes={name: list(shape) for name, shape in shapes.items()}), dtype)
    asked = LoadStateDictConfig(dtype=dtype, weight_mapping=[converter], ignore_mismatched_sizes=True)
    info, _ = model_class._load_pretrained_model(model, None, [str(file) for file in files], asked)
    return model, info


def assert_same_conversion(
    files: Sequence[Path], shapes: Mapping[str, Any], dtype: torch.dtype, make: Any
) -> tuple[Any, Any]:
    expected, expected_info = loaded(Holder, files, shapes, dtype, make())
    found, info = loaded(loading_class(Holder), files, shapes, dtype, make())
    states = [{n: tensor_state("parameter", p) for n, p in m.named_parameters()} for m in (expected, found)]
    assert states[1] == states[0]
    assert (info.missing_keys, info.unexpected_keys) == (expected_info.missing_keys, expected_info.unexpected_keys)
    assert info.mismatched_keys == expected_info.mismatched_keys
    assert info.conversion_errors.keys() == expected_info.conversion_errors.keys()
    return found, info


@st.composite
def shapes(draw: st.DrawFn) -> list[int]:
    return draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))


def filled(shape: Sequence[int], dtype: torch.dtype, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return (torch.rand(tuple(shape), generator=generator) * 100).to(dtype)


THOROUGH = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@THOROUGH
@given(data=st.data())
def test_experts_are_joined_as_by_transformers(data: st.DataObject) -> None:
    kinds = data.draw(st.sampled_from(["merge", "concatenate", "both", "merge, then turn"]))
    n_patterns = 1 if kinds.startswith("merge") else data.draw(st.integers(1, 3))
    n_experts = 1 if kinds == "concatenate" else data.draw(st.integers(1, 11))
    shape = data.draw(shapes())
    stack_dim = data.draw(st.integers(0, len(shape)))
    n_dims = len(shape) + (kinds != "concatenate")
    joint_dim = data.draw(st.integers(-n_dims, n_dims - 1))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    target = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    sources = [f"experts.*.w{number}" if kinds != "concatenate" else f"w{number}_" for number in range(n_patterns)]
    operations = {
        "merge": [MergeModulelist(stack_dim)],
        "concatenate": [Concatenate(joint_dim)],
        "both": [MergeModulelist(stack_dim), Concatenate(joint_dim)],
        "merge, then turn": [MergeModulelist(0), Transpose(0, 1)],
    }[kinds]

    stored: dict[str, torch.Tensor] = {}
    for pattern in sources:
        for expert in range(n_experts):
            key = "blocks.0." + pattern.replace("*", str(expert))
            stored[key] = filled(shape, dtypes[len(stored) % len(dtypes)], len(stored))
    if len(stored) > 1 and data.draw(st.integers(0, 5)) == 0:
        del stored[data.draw(st.sampled_from(sorted(stored)))]
    if data.draw(st.integers(0, 5)) == 0:
        other = data.draw(st.sampled_from(sorted(stored)))
        stored[other] = filled([*shape[:-1], shape[-1] + 1], torch.float32, 99)

    whole = joined(kinds, shape, n_patterns, n_experts, stack_dim, joint_dim)
    if data.draw(st.integers(0, 5)) == 0:
        whole = (*whole[:-1], whole[-1] + 1)
    with tempfile.TemporaryDirectory() as folder:
        files = in_files(stored, Path(folder), data.draw(st.integers(1, 3)))
        assert_same_conversion(files, {"fused": whole}, target, lambda: WeightConverter(sources, "fused", operations))


def joined(
    kinds: str, shape: Sequence[int], n_patterns: int, n_experts: int, stack_dim: int, joint_dim: int
) -> tuple[int, ...]:
    """The shape of what comes of all experts."""
    parts = torch.empty(tuple(shape), device="meta")
    if kinds != "concatenate":
        parts = torch.stack([parts] * n_experts, 0 if kinds == "merge, then turn" else stack_dim)
    if kinds == "merge, then turn":
        return tuple(parts.transpose(0, 1).shape)
    return tuple(parts.shape if kinds == "merge" else torch.cat([parts] * n_patterns, joint_dim).shape)


def in_files(stored: Mapping[str, torch.Tensor], folder: Path, n_files: int) -> list[Path]:
    """Files with every n-th tensor."""
    files = []
    for number in range(min(n_files, len(stored))):
        files.append(folder / f"model-{number}.safetensors")
        save_file(dict(list(stored.items())[number::n_files]), files[-1])
    return files


@THOROUGH
@given(data=st.data())
def test_a_tensor_is_cut_as_by_transformers(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    names = ["query", "key", "value"][: data.draw(st.integers(1, 3))]
    stored_as, target = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES[:3]))
    pieces = torch.empty(tuple(shape), device="meta").chunk(len(names), dim)
    built = dict.fromkeys(names, (2,)) | {name: tuple(piece.shape) for name, piece in zip(names, pieces, strict=False)}
    if data.draw(st.integers(0, 5)) == 0:
        built["query"] = (*built["query"], 1)
    with tempfile.TemporaryDirectory() as folder:
        files = in_files({"blocks.0.qkv": filled(shape, stored_as, 0)}, Path(folder), 1)
        assert_same_conversion(files, built, target, lambda: WeightConverter("qkv", names, [Chunk(dim)]))


def test_a_tensor_is_cut_into_as_many_as_the_config_says(tmp_path: Path) -> None:
    files = in_files({"blocks.0.all": filled([6, 3], torch.float32, 0)}, tmp_path, 1)

    def make() -> Any:
        return WeightConverter("all", "part*", [Chunk(0, num_shards_attribute="n_shards")])

    assert_same_conversion(files, {"part0": (3, 3), "part1": (3, 3)}, torch.bfloat16, make)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_of_experts_are_laid_side_by_side(tmp_path: Path, dtype: torch.dtype) -> None:
    # fastload writes tensors where pages begin; others would be copied.
    experts = {
        f"blocks.0.experts.{n}.{w}": filled([4, PAGE_ELEMENTS], torch.float32, n) for n in range(6) for w in "ab"
    }
    fastload.save_state_dict(experts, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    sources = ["experts.*.a", "experts.*.b"]

    def make() -> Any:
        return WeightConverter(sources, "fused", [MergeModulelist(0), Concatenate(1)])

    model, _ = assert_same_conversion(files, {"fused": (6, 8, PAGE_ELEMENTS)}, dtype, make)
    n_bytes = 6 * 8 * PAGE_ELEMENTS * 4
    done = {action: n for action, n in fastload.report(model).bytes_by_action.items() if n}
    assert done == {"remap" if dtype is torch.float32 else "gather": n_bytes}


def test_chunks_along_the_first_dimension_are_views_of_the_file(tmp_path: Path) -> None:
    files = in_files({"blocks.0.qkv": filled([9, 4], torch.float32, 0)}, tmp_path, 1)

    def make() -> Any:
        return WeightConverter("qkv", ["query", "key", "value"], [Chunk(0)])

    model, _ = assert_same_conversion(files, dict.fromkeys(["query", "key", "value"], (3, 4)), torch.float32, make)
    assert fastload.report(model).bytes_by_action == {"map": 9 * 4 * 4}
