"""Models that torch.distributed lays out over many ranks: what of each tensor is here.

A module whose parameters are DTensors (after `parallelize_module`, `fully_shard`, or both) is filled as any other: each
is described with the box that its placements give this rank, the plan is made for that box, and what comes of it
becomes the local part of a DTensor of the same mesh and placements. There is no collective in a load, and no tensor is
ever whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from math import prod
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastload.errors import OptionError
from fastload.plan.boxes import Box, Joined, Split, box_of, joined_of

__all__ = ["boxes_of", "device_on", "like", "local", "may_have_strides", "mesh_device", "part_of", "parts_of"]

Part = TypeVar("Part", Box, Joined)


def boxes_of(modules: Mapping[str, nn.Module]) -> dict[str, Box]:
    """The boxes of those tensors of walked modules that are DTensors, by name.

    Raises:
        OptionError: a placement is not one that weights can have, or leaves this rank nothing to hold.
    """
    parts = parts_of(modules)
    for fqn, tensor in _dtensors(modules):
        if isinstance(parts[fqn], Joined):
            raise _unknown(fqn, tensor)
    return cast(dict[str, Box], parts)


def parts_of(modules: Mapping[str, nn.Module]) -> dict[str, Box | Joined]:
    """As `boxes_of`, and boxes side by side of those that are split by groups, as packed projections are."""
    return {fqn: part_of(fqn, tensor) for fqn, tensor in _dtensors(modules)}


def may_have_strides(modules: Mapping[str, nn.Module]) -> bool:
    """Whether the parts of walked modules may have strides of their own.

    `fully_shard` takes the part of a parameter for one run of memory, from which it sends.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is None or not any(isinstance(module, fsdp.FSDPModule) for module in modules.values())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is on this rank; a plain tensor is all of it. It shares the tensor's memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like(part: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """This rank's part as a tensor of the kind of another: a DTensor of its mesh, placements and shape, or as it is.

    Where that is a parameter it is one too, marked as `nn.Parameter` marks what it has detached: to detach what nobody
    else has would take 50 us more of DTensor's engine, and milliseconds for the first of each shape.
    """
    if not isinstance(old, DTensor) or isinstance(part, DTensor):
        return part
    new = DTensor.from_local(
        part, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )
    if isinstance(old, nn.Parameter):
        new.requires_grad_(old.requires_grad and (part.is_floating_point() or part.is_complex()))
        new._is_param = True
    return new


def mesh_device(modules: Mapping[str, nn.Module]) -> str | None:
    """Where the parts of walked modules' DTensors belong: this rank's device of their mesh; None if there are none."""
    for _, tensor in _dtensors(modules):
        return device_on(tensor.device_mesh)
    return None


def device_on(mesh: DeviceMesh) -> str:
    """This rank's device of a mesh."""
    kind = mesh.device_type
    return kind if kind == "cpu" else f"{kind}:{torch.get_device_module(kind).current_device()}"


def _dtensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, DTensor]]:
    if not (dist.is_available() and dist.is_initialized()):
        return  # there is no mesh, and so no DTensor; most processes never have one
    for prefix, module in modules.items():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if isinstance(tensor, DTensor):
                    yield f"{prefix}.{name}" if prefix else name, tensor


def part_of(fqn: str, tensor: DTensor) -> Box | Joined:
    """The part of a DTensor that is on this rank: what its splits leave, in the order in which they were made.

    Args:
        fqn: its name, for the error.
        tensor: the DTensor.

    Raises:
        OptionError: as for `boxes_of`.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise OptionError(
            "this rank is not in the mesh of a parameter, and has no part of it",
            key=fqn,
            found=str(mesh),
            fix="build the module on the ranks of its mesh only",
        )
    splits: list[Split] = []
    # FSDP cuts what tensor parallelism left, though its dimension of the mesh comes first; DTensor calls that a strided
    # shard. Such a cut is made after all plain ones.
    strided: list[tuple[Split, int]] = []
    for number, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        # A strided shard is a Shard in some versions of torch, and a class of its own in others.
        factor: int | None = getattr(placement, "split_factor", None)
        if not (isinstance(placement, Shard) or factor is not None):
            raise _unknown(fqn, tensor)
        dim: int = placement.dim  # type: ignore[attr-defined, unused-ignore]
        split = Split(dim % tensor.ndim, mesh.size(number), coordinate[number])
        if factor is None:
            splits.append(split)
        else:
            strided.append((split, factor))
    if len(strided) == 1 and all(split.dim != strided[0][0].dim for split in splits):
        # Nothing else cuts this dimension: what is strided are the parts of several tensors that are one.
        [(split, n_groups)] = strided
        return _checked(fqn, tensor, joined_of(tuple(tensor.shape), split, n_groups, splits))
    for split, factor in reversed(strided):
        if factor != prod(before.n_parts for before in splits if before.dim == split.dim):
            raise _unknown(fqn, tensor)
        splits.append(split)
    return _checked(fqn, tensor, box_of(tuple(tensor.shape), splits))


def _checked(fqn: str, tensor: DTensor, part: Part) -> Part:
    if part.shape != tuple(tensor._local_tensor.shape):
        raise _unknown(fqn, tensor)
    return part


def _unknown(fqn: str, tensor: DTensor) -> OptionError:
    return OptionError(
        "a parameter is laid out over ranks in a way that fastload does not know",
        key=fqn,
        expected="Replicate, Shard, or the two-dimensional layout of fully_shard over parallelize_module",
        found=f"{tensor.placements} of {list(tensor.shape)}, {list(tensor._local_tensor.shape)} here",
    )
