"""Checkpoints of two generations that differ in every tensor, and which of them a folder holds."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import torch

from fastload.errors import CheckpointNotFoundError
from fastload.loader import load_state_dict
from fastload.saver import save_checkpoint
from fastload.sources.journal import apply_view
from tests.conftest import same_bytes

__all__ = ["KINDS", "NOTHING", "Kind", "generation_in", "save", "tensors_of"]

NOTHING = -1


class Kind(NamedTuple):
    """A way to save."""

    safe: bool
    max_shard_bytes: int


KINDS = {
    "safetensors": Kind(True, 10_000),
    "3 safetensors": Kind(True, 1_100),
    "bin": Kind(False, 10_000),
    "2 bin": Kind(False, 1_600),
}


def tensors_of(generation: int) -> dict[str, torch.Tensor]:
    """Random bits, of several types, an empty tensor and a scalar among them."""
    chance = torch.Generator().manual_seed(generation)
    bits = {f"layer.{i}.weight": torch.randint(0, 256, (800,), dtype=torch.uint8, generator=chance) for i in range(3)}
    types = (torch.float32, torch.bfloat16, torch.float8_e5m2)
    tensors = {key: value.view(dtype) for (key, value), dtype in zip(bits.items(), types, strict=True)}
    return tensors | {"empty": torch.empty(0, 3), "step": torch.tensor(generation)}


def save(folder: str, generation: int, kind: str, *, sync: bool = False) -> None:
    """Save a generation, config included."""
    save_checkpoint(
        tensors_of(generation),
        folder,
        max_shard_size=KINDS[kind].max_shard_bytes,
        safe_serialization=KINDS[kind].safe,
        extra_files={"config.json": json.dumps({"generation": generation})},
        durability="full" if sync else "none",
    )


def generation_in(folder: str) -> int | str:
    """The one generation that config and every bit of every tensor are of, -1 if nothing is there; else what is wrong.

    Whatever error a load meets counts as wrong, but for the one that says that there is no checkpoint.
    """
    try:
        tensors = load_state_dict(folder)
    except CheckpointNotFoundError as error:
        there = os.listdir(folder) if os.path.exists(folder) else []
        return NOTHING if all(name.startswith(".fastload-") for name in there) else str(error)
    except Exception as error:  # noqa: BLE001  reported as what the folder holds
        return f"{type(error).__name__}: {error}"
    with open(apply_view(folder, "config.json")) as file:
        generation = json.load(file)["generation"]
    expected = tensors_of(generation)
    if tensors.keys() != expected.keys() or not all(same_bytes(tensors[key], expected[key]) for key in expected):
        return f"the config of generation {generation}, and other tensors"
    assert isinstance(generation, int)
    return generation
