"""Random values for parameters, with the distributions that transformers uses.

One parameter at a time, so that a loader can initialise exactly those that a checkpoint lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["Initialiser", "Rules", "fill", "zeros"]

# Fills a tensor in place; the number is the standard deviation of the config.
Initialiser = Callable[[nn.Module, Tensor, float], None]
# Class of the module -> name of the parameter in it -> how it is filled.
Rules = Mapping[type[nn.Module], Mapping[str, Initialiser]]


def zeros(module: nn.Module, tensor: Tensor, std: float) -> None:
    tensor.zero_()


def ones(module: nn.Module, tensor: Tensor, std: float) -> None:
    tensor.fill_(1)


def normal(module: nn.Module, tensor: Tensor, std: float) -> None:
    tensor.normal_(0.0, std)


def normal_but_padding(module: nn.Module, tensor: Tensor, std: float) -> None:
    tensor.normal_(0.0, std)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        tensor[padding].zero_()


_WEIGHT_AND_BIAS: Mapping[str, Initialiser] = {"weight": normal, "bias": zeros}
_SCALE_AND_SHIFT: Mapping[str, Initialiser] = {"weight": ones, "bias": zeros}
_RULES: Rules = {
    nn.Linear: _WEIGHT_AND_BIAS,
    nn.Conv1d: _WEIGHT_AND_BIAS,
    nn.Conv2d: _WEIGHT_AND_BIAS,
    nn.Embedding: {"weight": normal_but_padding},
    nn.LayerNorm: _SCALE_AND_SHIFT,
    nn.RMSNorm: _SCALE_AND_SHIFT,
    nn.GroupNorm: _SCALE_AND_SHIFT,
}


def _initialiser_for(module: nn.Module, name: str, extra: Rules) -> Initialiser | None:
    for cls in type(module).__mro__:
        for rules in (extra, _RULES):
            found = rules.get(cls, {}).get(name)
            if found is not None:
                return found
    return None


def fill(module: nn.Module, name: str, tensor: Tensor, std: float, extra: Rules) -> bool:
    """Initialise in place what ``module`` calls ``name``.

    Args:
        tensor: the parameter; on meta it has no values to set.
        std: standard deviation of normal distributions.
        extra: rules of the family, looked at first. A rule for a class holds for its subclasses.

    Returns:
        False where no rule says how.
    """
    initialiser = _initialiser_for(module, name, extra)
    if initialiser is None:
        return False
    if not tensor.is_meta:
        with torch.no_grad():
            initialiser(module, tensor, std)
    return True
