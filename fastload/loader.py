"""Loading any module, or a plain dict of tensors, from a checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastload.checkpoint import open_checkpoint
from fastload.filling import fill_module, ranks_of_machine
from fastload.options import PINNED_BYTES, LoadOptions, parse_dtype
from fastload.pauses import paused_collector
from fastload.placement.device import Staging, begin_pinning, has_staged_rows
from fastload.placement.device_map import DeviceMapArgument, lay_out, on_one_device, reject_other_devices
from fastload.placement.network import read_apart
from fastload.placement.placing import place_all
from fastload.plan.fusing import Fusion
from fastload.plan.keys import KeyRules
from fastload.plan.planning import plan_state_dict
from fastload.plan.sharding import parse_size
from fastload.plan.slots import walk_modules
from fastload.reports import LoadReport, Stopwatch
from fastload.storage.devices import device_for
from fastload.streaming.arrivals import parse_memory_budget
from fastload.streaming.blocks import block_classes

if TYPE_CHECKING:
    pass

__all__ = ["load_model", "load_state_dict", "parse_pinned_memory"]


def load_state_dict(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    pinned_memory: int | str | None = None,
    verify: bool = False,
    **where: Any,
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by key.

    Args:
        path: a folder, one weight file, an index, or a hub id.
        device: where the tensors shall be. On the CPU they are views of the mapped files.
        dtype: type that floating point tensors are converted to; None keeps each one's own.
        pinned_memory: most host memory that is pinned to load to a CUDA device, as a number or "512MB"; None for
            268 MB. It is kept for the next load (see `free_pinned_memory`).
        verify: first compare all bytes of the files with their checksums (see `Checkpoint.verify`).
        where: which files, as for `open_checkpoint`.

    Raises:
        IntegrityError: with ``verify``, bytes are not those that were written.
    """
    options = LoadOptions(dtype=parse_dtype(dtype), pinned_bytes=parse_pinned_memory(pinned_memory))
    with paused_collector():
        return _state_dict(path, options, device, verify, where)


def _state_dict(
    path: str | os.PathLike[str],
    options: LoadOptions,
    device: str | torch.device,
    verify: bool,
    where: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    # A function of its own, so that specs and plan are gone when the collector resumes, and it need not walk them.
    checkpoint = open_checkpoint(path, **where)
    staging = Staging(device_for, options.pinned_bytes, path_of=checkpoint.held_path)
    begin_pinning([str(device)], lambda: checkpoint.n_bytes, staging)
    if verify:
        checkpoint.verify()
    plan = plan_state_dict(checkpoint.specs, dtype=options.dtype, device=str(device), fused=checkpoint.fused)
    beside_a_device = has_staged_rows(plan, staging)
    if not beside_a_device:
        checkpoint.read_ahead(in_file_order=True)
    tensors = place_all(*read_apart(plan, checkpoint, beside_a_device=beside_a_device), staging).tensors
    if any(key != placed for key, placed in zip(checkpoint, tensors, strict=True)):
        tensors = {key: tensors[key] for key in checkpoint}
    return tensors | {dropped: tensors[kept] for dropped, kept in checkpoint.aliases.items()}


def load_model(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    device_map: DeviceMapArgument = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: str | torch.dtype | None = None,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    fusions: Sequence[Fusion] = (),
    detached: bool = False,
    lazy: bool = False,
    stream: bool = False,
    memory_budget: int | str | None = None,
    pinned_memory: int | str | None = None,
    dedup: str | None = None,
    verify: bool = False,
    **where: Any,
) -> LoadReport:
    """Fill any module from a checkpoint.

    A parameter on the meta device becomes a view of the mapped file (or a tensor on ``device``); one that has memory
    keeps it and is overwritten in place, so that optimisers and hooks that hold it stay right. Of a DTensor (after
    `parallelize_module`, `fully_shard`, or both) each rank reads and makes its own part; ranks do not wait for each
    other.

    Args:
        module: the module, built on meta or for real.
        path: a folder, one weight file, an index, or a hub id.
        device: where parameters on meta shall be made; None for the CPU, or for this rank's device of the mesh where
            parameters are DTensors.
        device_map: in place of ``device``: a device, a strategy ("auto", "balanced", "balanced_low_0", "sequential"),
            or module name -> device, for a module on meta. What is on "cpu" or "disk" beside an accelerator computes
            on the first one, and is brought there for each forward, a block while the one before computes.
        max_memory: device -> limit for the strategies, such as ``{0: "10GB", "cpu": "4GB"}``.
        dtype: type for floating point parameters on meta; None for the one the module was built with.
        strict: raise KeyMatchError on any missing, unexpected or mismatched key, before anything is changed.
        ignore_mismatched_sizes: leave parameters alone whose shape differs (they must have memory).
        key_mapping: regular expression -> replacement for the files' keys.
        fusions: tensors of the module that the files keep in pieces, such as the experts of a layer.
        detached: copy what would stand on the mapped files, so that they may be rewritten in place (see `detach`).
        lazy: bring the weights of a block when it is first used.
        stream: bring them in the background, in the order of use, while the first forward may begin.
        memory_budget: most bytes of weights to keep in memory, as a number or "4GB"; blocks beyond it are read for
            each forward, while the block before computes.
        pinned_memory: most host memory that is pinned to load to a CUDA device, as for `load_state_dict`.
        dedup: "node" to have the ranks of a machine read cold files for each other: each byte that several of them
            need is read by one and handed over, as are parts side by side whose rows are short. All ranks of the
            machine must load the same checkpoint, at the same time. The default, None, has each rank read its own
            part, and waits for nobody; it is right wherever the ranks share a page cache: that reads a byte once for
            all who map it, and they share its memory too. "node" is for where they do not: mounts of their own or
            without a cache, a checkpoint that is larger than memory, storage that is slow with short rows.
        verify: first compare all bytes of the files with their checksums (see `Checkpoint.verify`).
        where: which files, as for `open_checkpoint`.

    Raises:
        KeyMatchError: the keys do not fit.
        RankError: with ``dedup``, another rank of the machine failed, or is gone.
        IntegrityError: with ``verify``, bytes are not those that were written.
        IncompleteModelError: something would be left on meta.
    """
    clock = Stopwatch()
    home = _mesh_device(module)
    layout = on_one_device(device or home or "cpu", memory_budget)
    if device_map is not None or max_memory is not None:
        reject_other_devices(module, device, home)
        layout = lay_out(module, device_map, max_memory, dtype, memory_budget, block_classes(walk_modules(module)))
    options = LoadOptions(
        dtype=parse_dtype(dtype),
        device_map=layout.placed_on,
        is_dispatched=layout.is_dispatched,
        strict=strict,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        key_mapping=key_mapping,
        detached=detached,
        lazy=lazy,
        stream=stream,
        memory_budget_bytes=parse_memory_budget(layout.memory_budget),
        pinned_bytes=parse_pinned_memory(pinned_memory),
        dedup=dedup,
    )
    with paused_collector(), ranks_of_machine(options) as node:
        with clock("open"):
            checkpoint = open_checkpoint(path, **where)
            begin_pinning(
                options.device_map.values(), lambda: checkpoint.n_bytes, Staging(device_for, options.pinned_bytes)
            )
            if layout.memory_budget is None and home is None and node is None:
                checkpoint.read_ahead()
        if verify:
            with clock("verify"):
                checkpoint.verify()
        rules = KeyRules(fusions=tuple(fusions))
        result = fill_module(module, checkpoint, options, source=os.fspath(path), clock=clock, rules=rules, node=node)
    if device_map is not None:
        module.hf_device_map = layout.devices  # type: ignore[assignment]
    return result


def parse_pinned_memory(pinned_memory: int | str | None) -> int:
    """Bytes of a limit of pinned memory: a number or "512MB"; None for the usual. OptionError if it is neither."""
    return PINNED_BYTES if pinned_memory is None else parse_size(pinned_memory, "pinned_memory")


def _mesh_device(module: nn.Module) -> str | None:
    """Where the parts of a module's DTensors belong; None if it has none."""
    if "torch.distributed.tensor" not in sys.modules:
        return None  # nobody can have made one
    from fastload.distributed.layouts import mesh_device

    return mesh_device(walk_modules(module))
