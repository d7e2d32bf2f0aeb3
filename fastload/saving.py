"""Saving any module: its tensors wherever they are, in memory, on devices, or offloaded to disk by accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from fastload.distributed.detection import are_laid_out, is_first_rank
from fastload.errors import SaveError
from fastload.options import Durability
from fastload.saver import SaveReport, save_checkpoint
from fastload.sources.hub import upload

__all__ = ["load_of_offloaded", "save_model", "with_offloaded"]

Load: TypeAlias = Callable[[], torch.Tensor]


def save_model(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    is_main_process: bool = True,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    metadata: Mapping[str, str] | None = None,
    variant: str | None = None,
    durability: Durability = "full",
    incremental: bool = False,
    push_to_hub: str | None = None,
    token: str | bool | None = None,
) -> SaveReport | None:
    """Save the tensors of any module, for `load_model`. No config is written.

    Tensors that share memory are stored once, non-contiguous ones and views by their values. What accelerate keeps on
    disk is read from there when it is written, a tensor at a time.

    Args:
        module: the module.
        folder: made if need be, with its parents.
        state_dict: tensors to save in place of the module's own.
        is_main_process: False does nothing, for all ranks but one of a distributed program. With DTensors every rank
            has to call, and takes part whatever this is.
        max_shard_size, safe_serialization, metadata, variant, durability, incremental: as for `save_state_dict`.
        push_to_hub: the repository to upload to afterwards, made if need be.
        token: for the hub.

    Returns:
        What was written; None if this is not the main process.

    Raises:
        OptionError: something in the state dict cannot be saved.
        SaveError: tensors are on the meta device and nothing is known to load them, or the operating system refused.
    """
    tensors = dict(module.state_dict() if state_dict is None else state_dict)
    is_together = are_laid_out(tensors.values())
    if not (is_main_process or is_together):
        return None
    deferred = {
        key: load
        for key, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_meta and (load := load_of_offloaded(module, key)) is not None
    }
    report = save_checkpoint(
        tensors,
        folder,
        max_shard_size=max_shard_size,
        safe_serialization=safe_serialization,
        metadata=metadata,
        variant=variant,
        deferred=deferred,
        durability=durability,
        incremental=incremental,
    )
    if push_to_hub is not None and (not is_together or is_first_rank()):
        upload(os.fspath(folder), (*report.files, *report.kept), push_to_hub, token=token)
    return report


def with_offloaded(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a module by name, those on meta as the hooks that bring them for a forward would load them."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        load = load_of_offloaded(module, name) if isinstance(tensor, torch.Tensor) and tensor.is_meta else None
        if load is not None:
            found[name] = load()
    return found


def load_of_offloaded(module: Any, name: str) -> Load | None:
    """What loads an offloaded tensor: the hook of accelerate that would load it for a forward. None without one.

    Args:
        module: a module that accelerate dispatched.
        name: of one of its parameters or buffers.
    """
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        try:
            hook = getattr(module.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        except AttributeError:
            continue
        for single in getattr(hook, "hooks", (hook,)):
            weights = getattr(single, "weights_map", None)
            if weights is not None:
                return partial(_loaded, weights, ".".join(parts[depth:]), name)
    return None


def _loaded(weights: Mapping[str, torch.Tensor], key: str, name: str) -> torch.Tensor:
    try:
        return weights[key]
    except KeyError as error:
        raise SaveError("an offloaded tensor is not where its hook looks for it", key=name) from error
