"""Loading fused tensors, against stacking and concatenating them."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import fastload
from fastload.plan.fusing import Concatenate, Fusion, Stack
from tests.conftest import same_bytes

FUSIONS = (
    Fusion(("experts.*.gate.weight", "experts.*.up.weight"), "experts.gate_up", (Stack(0), Concatenate(1))),
    Fusion(("experts.*.down.weight",), "experts.down", (Stack(0),)),
)


class Experts(nn.Module):
    def __init__(self, n_experts: int, inner: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * inner, hidden, dtype=dtype))
        self.down = nn.Parameter(torch.empty(n_experts, hidden, inner, dtype=dtype))


class Layer(nn.Module):
    def __init__(self, n_experts: int, inner: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = Experts(n_experts, inner, hidden, dtype)
        self.norm = nn.Parameter(torch.empty(3, dtype=dtype))


def write(
    folder: Path, n_experts: int, inner: int, hidden: int, dtype: torch.dtype, n_shards: int
) -> dict[str, torch.Tensor]:
    """A checkpoint of single experts in shards; returns what the fused tensors should be."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(n_experts)
    state = {"norm": torch.randn(3).to(dtype)}
    for expert in range(n_experts):
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            state[f"experts.{expert}.{name}.weight"] = torch.randn(shape).to(dtype)
    keys = sorted(state)
    shards = {f"model-{i + 1:05}-of-{n_shards:05}.safetensors": keys[i::n_shards] for i in range(n_shards)}
    for name, members in shards.items():
        save_file({key: state[key] for key in members}, folder / name)
    weight_map = {key: name for name, members in shards.items() for key in members}
    from fastload.formats.index import encode_index

    (folder / "model.safetensors.index.json").write_text(encode_index(weight_map, 0, 0))
    gate, up, down = (
        torch.stack([state[f"experts.{e}.{name}.weight"] for e in range(n_experts)]) for name in ("gate", "up", "down")
    )
    return {"norm": state["norm"], "experts.gate_up": torch.cat([gate, up], dim=1), "experts.down": down}


def load(folder: Path, sizes: tuple[int, int, int], built: torch.dtype, **options: object) -> Layer:
    with torch.device("meta"):
        layer = Layer(*sizes, built)
    fastload.load_model(layer, folder, fusions=FUSIONS, **options)  # type: ignore[arg-type]
    return layer


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 12), st.sampled_from([1, 3, 16, 64]), st.sampled_from([2, 5, 32, 64])),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    n_shards=st.integers(1, 3),
    cast=st.sampled_from([None, torch.float32]),
)
def test_fused_tensors_are_bit_equal_to_stacked_ones(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    n_shards: int,
    cast: torch.dtype | None,
) -> None:
    folder = tmp_path_factory.mktemp("experts")
    expected = write(folder, *sizes, dtype, n_shards)
    found = load(folder, sizes, dtype, dtype=cast).state_dict()
    for name, tensor in expected.items():
        assert same_bytes(found[name], tensor.to(cast or dtype)), name


SIZES = (8, 64, 128)  # an expert's matrix is 16 kB of bfloat16: whole pages


def test_pages_are_shared_and_only_edges_are_copied(tmp_path: Path) -> None:
    write(tmp_path, *SIZES, torch.bfloat16, 1)
    report = fastload.report(load(tmp_path, SIZES, torch.bfloat16))
    assert report.n_tensors == 25
    assert report.bytes_by_action["remap"] > 0.5 * report.n_bytes
    assert sum(report.bytes_by_action.values()) == report.n_bytes
    assert report.mapped_share > 0.5


def test_a_fused_parameter_trains_copies_and_forks_like_any_other(tmp_path: Path) -> None:
    expected = write(tmp_path, *SIZES, torch.bfloat16, 2)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    layer = load(tmp_path, SIZES, torch.bfloat16)
    weight = layer.experts.gate_up
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    (weight.float().sum() + layer.experts.down.float().sum()).backward()
    optimiser.step()
    assert same_bytes(weight, expected["experts.gate_up"] - 1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert weight.untyped_storage().nbytes() == weight.nbytes
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the pool of threads that torch computes with did not come along
        with torch.no_grad():
            weight.zero_()
        os._exit(0 if weight.abs().max() == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same_bytes(weight, expected["experts.gate_up"] - 1)


def test_a_module_with_memory_is_filled_in_place(tmp_path: Path) -> None:
    expected = write(tmp_path, *SIZES, torch.bfloat16, 1)
    layer = Layer(*SIZES, torch.float32)
    held = layer.experts.down
    fastload.load_model(layer, tmp_path, fusions=FUSIONS)
    assert layer.experts.down is held
    assert same_bytes(held, expected["experts.down"].float())


def test_the_files_may_go_and_the_mappings_end_with_the_model(tmp_path: Path) -> None:
    expected = write(tmp_path, *SIZES, torch.bfloat16, 1)
    layer = load(tmp_path, SIZES, torch.bfloat16)
    for path in tmp_path.iterdir():
        path.unlink()
    assert same_bytes(layer.experts.down, expected["experts.down"])
    del layer
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    write(tmp_path, 3, 2, 2, torch.float32, 1)
    (tmp_path / "model.safetensors.index.json").unlink()
    (shard,) = tmp_path.glob("*.safetensors")
    state = fastload.load_state_dict(shard)
    del state["experts.1.up.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(fastload.FastloadError, match=r"experts\.gate_up"):
        load(tmp_path / "model.safetensors", (3, 2, 2), torch.float32)
