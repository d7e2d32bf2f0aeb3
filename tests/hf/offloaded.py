"""Models that a device map leaves elsewhere than in memory: loaded, run, and held beside what transformers makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastload import hf
from tests.conftest import same_bytes
from tests.hf.sides import assert_same_load, assert_same_models


def load(model_class: Any, folder: Path | None, **options: Any) -> Any:
    with hf.enabled():
        return model_class.from_pretrained(folder, **options)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(24).reshape(2, 12)
    decoded = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, **decoded)[0]
    return found


def on_meta(model: Any) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if tensor.is_meta}


def assert_same_offload(kind: Any, folder: Path | None, offload: Path, **options: Any) -> Any:
    """Both load the same, compute the same, twice, and lie the same afterwards. Returns fastload's model."""
    stock = assert_same_load(kind, folder, offload_folder=offload, **options).model
    # The other side of the comparison is given no folder.
    loaded, expected = load(kind, folder, **options), kind.from_pretrained(folder, offload_folder=offload, **options)
    assert stock is not None
    assert_same_models(expected, loaded)
    for _ in range(2):
        assert same_bytes(logits(loaded), logits(expected))
        assert_same_models(expected, loaded)
    return loaded
