"""Fusions as data, checked against torch's own stack and cat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastload.dtypes import DTYPES
from fastload.errors import KeyMatchError, OptionError
from fastload.formats.specs import Region, TensorSpec, contiguous_stride
from fastload.plan.fusing import Concatenate, FusedSpec, Fusion, Stack, fuse

GATE_UP = Fusion(
    ("experts.*.gate_proj.weight", "experts.*.up_proj.weight"), "experts.gate_up_proj", (Stack(0), Concatenate(1))
)
DOWN = Fusion(("experts.*.down_proj.weight",), "experts.down_proj", (Stack(0),))


def spec(key: str, shape: tuple[int, ...], dtype: str = "F32") -> TensorSpec:
    return TensorSpec(key, DTYPES[dtype], shape, Region("file", 0, 0))


def specs(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {key: spec(key, shape) for key, shape in shapes.items()}


def carry_out(fused: FusedSpec, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The fused tensor, written piece by piece; every element exactly once."""
    result = torch.full(fused.shape, float("nan")).reshape(-1)
    for piece in fused.pieces:
        box = result.as_strided(piece.spec.shape, piece.stride, piece.offset)
        assert box.isnan().all()
        box.copy_(tensors[piece.spec.key])
    assert not result.isnan().any()
    return result.view(fused.shape)


def test_experts_become_one_tensor_per_layer() -> None:
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": (3, 2) if name == "down_proj" else (2, 3)
        for layer in range(2)
        for expert in range(11)
        for name in ("down_proj", "gate_proj", "up_proj")
    }
    rest, fused = fuse(specs({**shapes, "model.norm.weight": (3,)}), [GATE_UP, DOWN])
    assert list(rest) == ["model.norm.weight"]
    assert {f.key: f.shape for f in fused} == {
        f"model.layers.{layer}.mlp.experts.{name}": shape
        for layer in range(2)
        for name, shape in (("gate_up_proj", (11, 4, 3)), ("down_proj", (11, 3, 2)))
    }
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    base = "model.layers.1.mlp.experts"
    gate, up = (torch.stack([tensors[f"{base}.{e}.{n}_proj.weight"] for e in range(11)]) for n in ("gate", "up"))
    found = carry_out(next(f for f in fused if f.key == f"{base}.gate_up_proj"), tensors)
    assert torch.equal(found, torch.cat([gate, up], dim=1))
    assert all(piece.is_contiguous for f in fused for piece in f.pieces)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    n_stacked=st.integers(1, 4),
    n_sources=st.integers(1, 3),
    stack_dim=st.integers(-4, 3),
    concat_dim=st.integers(-4, 3),
    data=st.data(),
)
def test_any_stack_and_concatenation_is_torchs(
    shape: tuple[int, ...], n_stacked: int, n_sources: int, stack_dim: int, concat_dim: int, data: st.DataObject
) -> None:
    n_dims = len(shape) + 1
    stack_dim, concat_dim = stack_dim % n_dims, concat_dim % n_dims
    own_dim = None if concat_dim == stack_dim else concat_dim - (concat_dim > stack_dim)
    tensors = {}
    for source in range(n_sources):
        sizes = list(shape)
        if own_dim is not None:
            sizes[own_dim] = data.draw(st.integers(1, 4))
        tensors |= {f"x.{i}.{source}": torch.randn(sizes) for i in range(n_stacked)}
    operations = (Stack(stack_dim), *([Concatenate(concat_dim)] if n_sources > 1 else []))
    fusion = Fusion(tuple(f"x.*.{source}" for source in range(n_sources)), "whole", operations)
    rest, (fused,) = fuse(specs({key: tuple(tensor.shape) for key, tensor in tensors.items()}), [fusion])
    stacked = [torch.stack([tensors[f"x.{i}.{s}"] for i in range(n_stacked)], stack_dim) for s in range(n_sources)]
    expected = torch.cat(stacked, concat_dim) if n_sources > 1 else stacked[0]
    assert rest == {}
    assert torch.equal(carry_out(fused, tensors), expected)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_concatenation_without_a_stack(dim: int) -> None:
    sizes = {"a.q": (2, 3), "a.k": (2, 3), "a.v": (2, 3)}
    tensors = {key: torch.randn(size) for key, size in sizes.items()}
    _, (fused,) = fuse(specs(sizes), [Fusion(("q", "k", "v"), "qkv", (Concatenate(dim),))])
    assert fused.key == "a.qkv"
    assert torch.equal(carry_out(fused, tensors), torch.cat(list(tensors.values()), dim))


def test_a_name_that_merely_ends_alike_is_left_alone() -> None:
    rest, fused = fuse(specs({"myexperts.0.down_proj.weight": (2, 2)}), [DOWN])
    assert (list(rest), fused) == (["myexperts.0.down_proj.weight"], [])


def test_all_that_does_not_fit_is_in_one_error() -> None:
    broken = {
        "a.experts.0.down_proj.weight": (2, 2),
        "a.experts.2.down_proj.weight": (2, 2),
        "b.experts.0.gate_proj.weight": (2, 2),
        "c.experts.0.down_proj.weight": (2, 2),
        "c.experts.1.down_proj.weight": (2, 3),
    }
    with pytest.raises(KeyMatchError) as caught:
        fuse(specs(broken), [GATE_UP, DOWN])
    message = str(caught.value)
    assert "a.experts.down_proj: numbers of its pieces missing" in message
    assert "b.experts.gate_up_proj: experts.*.up_proj.weight missing" in message
    assert "c.experts.down_proj: its pieces differ" in message


def test_pieces_of_different_types_do_not_fuse() -> None:
    mixed = {
        f"experts.{i}.down_proj.weight": spec(f"experts.{i}.down_proj.weight", (2,), d)
        for i, d in enumerate(("F32", "BF16"))
    }
    with pytest.raises(KeyMatchError, match="differ"):
        fuse(mixed, [DOWN])


@pytest.mark.parametrize(
    ("sources", "operations"),
    [
        (("a", "b"), ()),
        (("a.*",), (Concatenate(0),)),
        (("a.*", "b.*"), (Concatenate(0), Stack(0))),
        (("a",), (Stack(),)),
    ],
)
def test_operations_that_make_no_tensor_of_the_sources_are_refused(
    sources: tuple[str, ...], operations: tuple[Stack | Concatenate, ...]
) -> None:
    with pytest.raises(OptionError):
        Fusion(sources, "t", operations)


def test_strides() -> None:
    assert contiguous_stride((2, 3, 4)) == (12, 4, 1)
    assert contiguous_stride(()) == ()
