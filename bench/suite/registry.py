"""All loaders, by what they load."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from suite.causal import DEVICE_MAP_LOADERS, LATER_LOADERS, LLAMA_LOADERS, MOE_LOADERS
from suite.loaders import BERT_LOADERS, Loader
from suite.tensors import TENSOR_LOADERS

__all__ = ["LOADERS", "available", "forward"]

LOADERS: dict[str, dict[str, Loader]] = {
    "bert": BERT_LOADERS,
    "llama": LLAMA_LOADERS,
    "later": LATER_LOADERS,
    "moe": MOE_LOADERS,
    "device map": DEVICE_MAP_LOADERS,
    "tensors": TENSOR_LOADERS,
}


def available(loaders: Mapping[str, Loader]) -> dict[str, Loader]:
    """Those whose package is installed; the others are named on stderr."""
    found = {name: loader for name, loader in loaders.items() if not loader.needs or find_spec(loader.needs)}
    for name in loaders.keys() - found.keys():
        print(f"{name}: left out, {loaders[name].needs} is not installed", file=sys.stderr)
    return found


def forward(model: Any, n_tokens: int = 32) -> Any:
    """The model's output for a row of tokens, as a flat tensor."""
    import torch

    with torch.inference_mode():
        output = model(torch.arange(1000, 1000 + n_tokens).unsqueeze(0))
    return output[0].flatten()
