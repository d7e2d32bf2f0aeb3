"""Building a model's shape without its values.

The parameters of a skeleton lie on the meta device and no initialiser runs, which is where an ordinary construction
spends its time. The state this needs belongs to the calling thread alone, so that models can be built in other
threads at the same moment.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fastload.initialisers import BuildOnMeta

__all__ = ["is_building_skeleton", "repeat_block", "skeleton"]

Block = TypeVar("Block", bound=nn.Module)

_CONTAINERS = frozenset({dict, OrderedDict, set, list})
_thread = threading.local()


@contextmanager
def skeleton() -> Iterator[None]:
    """Modules constructed inside have their parameters on meta, uninitialised.

    A buffer that is computed in a constructor must name ``device="cpu"`` to be real; native models do.
    """
    before = is_building_skeleton()
    _thread.building = True
    try:
        with BuildOnMeta():
            yield
    finally:
        _thread.building = before


def is_building_skeleton() -> bool:
    """Whether this thread is inside `skeleton`."""
    return getattr(_thread, "building", False)


def repeat_block(build: Callable[[int], Block], n_blocks: int) -> list[Block]:
    """``[build(0), build(1), ...]`` for blocks that differ in their ``layer_idx`` alone.

    In a skeleton only the first is constructed and the others are copies of its structure, at a tenth of the cost:
    a constructor runs some fifty torch functions a block, a copy none. Elsewhere every block is constructed.
    """
    if not is_building_skeleton() or n_blocks < 2:
        return [build(index) for index in range(n_blocks)]
    first = build(0)
    # The modes have nothing to do here, and would be asked at every access to a tensor.
    with torch._C.DisableTorchFunction():
        return [first, *(_copy_structure(first, index, {}) for index in range(1, n_blocks))]


def _copy_structure(module: Any, layer_idx: int, copies: dict[int, Any]) -> Any:
    """A module like this one with parameters, buffers, submodules and hooks of its own; copies keeps what is shared."""
    known = copies.get(id(module))
    if known is not None:
        return known
    copy = copies[id(module)] = module.__class__.__new__(module.__class__)
    state = module.__dict__.copy()
    for name, value in state.items():
        kind = type(value)
        if kind in _CONTAINERS:
            # Most are empty (hooks of many kinds), and a new one is made in a fraction of the time of a copy.
            state[name] = value.copy() if value else kind()
    if "layer_idx" in state:
        state["layer_idx"] = layer_idx
    for held in (state["_parameters"], state["_buffers"]):
        for name, tensor in held.items():
            if tensor is not None:
                held[name] = _copy_tensor(tensor, copies)
    modules = state["_modules"]
    for name, child in modules.items():
        modules[name] = None if child is None else _copy_structure(child, layer_idx, copies)
    copy.__dict__.update(state)
    return copy


def _copy_tensor(tensor: torch.Tensor, copies: dict[int, Any]) -> torch.Tensor:
    known = copies.get(id(tensor))
    if known is None:
        values = tensor.data if tensor.is_meta else tensor.data.clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        known = copies[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
    return cast(torch.Tensor, known)
