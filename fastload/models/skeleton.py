"""Building a model's shape without its values.

The parameters of a skeleton lie on the meta device and no initialiser runs, which is where an ordinary construction
spends its time. The state this needs (two torch function modes) belongs to the calling thread alone, so that models
can be built in other threads at the same moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["skeleton"]

# The initialisers that torch itself offers to a torch function mode; skipping the outermost call saves the most.
_INITIALISERS: frozenset[Callable[..., Any]] = frozenset(
    {
        nn.init.uniform_,
        nn.init.normal_,
        nn.init.constant_,
        nn.init.kaiming_uniform_,
        nn.init.kaiming_normal_,
    }
)
# What all other initialisers come down to.
_FILLS: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.Tensor.uniform_,
        torch.Tensor.normal_,
        torch.Tensor.fill_,
        torch.Tensor.zero_,
        torch.Tensor.erfinv_,
        torch.Tensor.clamp_,
        torch.Tensor.mul_,
        torch.Tensor.add_,
        torch.Tensor.copy_,
    }
)


class _SkipInitialisers(TorchFunctionMode):
    """Returns a meta tensor from an initialiser as it came. Real tensors (computed buffers) are initialised."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALISERS or func in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def skeleton() -> Iterator[None]:
    """Modules constructed inside have their parameters on meta, uninitialised.

    A buffer that is computed in a constructor must name ``device="cpu"`` to be real; native models do.
    """
    with torch.device("meta"), _SkipInitialisers():
        yield
