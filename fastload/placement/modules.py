"""Giving a module its tensors."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["give"]


def give(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a parameter or buffer in the place of the one of that name.

    Assigning the attribute does the same with checks that cost microseconds; it is done where a class has its own
    ideas of assigning, as `nn.LSTM` has, which keeps a list of its weights beside them.
    """
    if type(module).__setattr__ is not nn.Module.__setattr__:
        setattr(module, name, tensor)
    elif name in module._buffers:
        module._buffers[name] = tensor
    else:
        module._parameters[name] = tensor  # type: ignore[assignment]
