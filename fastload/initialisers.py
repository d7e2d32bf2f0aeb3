"""Building a model on meta without the initialisers, which have nothing to write to and take a quarter of the time.

What this needs belongs to the thread that enters it: models can be built in others at the same moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["SkipInitialisers"]

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


class SkipInitialisers(TorchFunctionMode):
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
