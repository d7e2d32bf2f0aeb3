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
        pattern = _Pattern(first, {})
        return [first, *(pattern.copy(index, {}) for index in range(1, n_blocks))]


class _Pattern:
    """A module as it is to be copied: looked at once, for as many copies as there will be.

    Args:
        module: the module.
        known: id -> pattern of what occurs in it more than once.
    """

    def __init__(self, module: nn.Module, known: dict[int, _Pattern]) -> None:
        known[id(module)] = self
        self._kind = module.__class__
        self._state = module.__dict__
        # Most containers are empty (hooks of many kinds), and a new one is made in a fraction of the time of a copy.
        held = [(name, value) for name, value in self._state.items() if type(value) in _CONTAINERS]
        self._empty = [(name, type(value)) for name, value in held if not value]
        self._filled = [(name, value) for name, value in held if value]
        self._tensors = [
            (holder, name, tensor)
            for holder in ("_parameters", "_buffers")
            for name, tensor in self._state[holder].items()
            if tensor is not None
        ]
        self._children = [
            (name, known.get(id(child)) or _Pattern(child, known))
            for name, child in self._state["_modules"].items()
            if child is not None
        ]

    def copy(self, layer_idx: int, copies: dict[int, Any]) -> Any:
        """A module with parameters, buffers, submodules and hooks of its own; copies keeps what is shared in it."""
        known = copies.get(id(self))
        if known is not None:
            return known
        copy = copies[id(self)] = self._kind.__new__(self._kind)
        state = self._state.copy()
        for name, kind in self._empty:
            state[name] = kind()
        for name, value in self._filled:
            state[name] = value.copy()
        if "layer_idx" in state:
            state["layer_idx"] = layer_idx
        for holder, name, tensor in self._tensors:
            state[holder][name] = _copy_tensor(tensor, copies)
        for name, child in self._children:
            state["_modules"][name] = child.copy(layer_idx, copies)
        copy.__dict__.update(state)
        return copy


def _copy_tensor(tensor: torch.Tensor, copies: dict[int, Any]) -> torch.Tensor:
    known = copies.get(id(tensor))
    if known is None:
        values = tensor.data if tensor.is_meta else tensor.data.clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        known = copies[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
    return cast(torch.Tensor, known)
