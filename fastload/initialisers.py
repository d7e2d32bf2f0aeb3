"""Building a model on meta without the initialisers, which have nothing to write to and take a quarter of the time.

What this needs belongs to the thread that enters it: models can be built in others at the same moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

__all__ = ["BuildOnMeta"]

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


class BuildOnMeta(TorchFunctionMode):
    """New tensors are on meta unless a device is named, and initialisers of meta tensors return them as they came.

    What ``torch.device("meta")`` does, and more, in one mode: each that is active is asked about every torch function.
    Real tensors (computed buffers) are initialised.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constructors = _device_constructors()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALISERS or func in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            # An empty tensor goes on, for the warning that torch gives.
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.numel():
                return tensor
        elif func in self._constructors and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
