"""The last stage of a load: tensors into the module, ties, first values of what no file has, and an audit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import NoneType

import torch
from torch import nn

from fastload.dtypes import to_torch
from fastload.errors import IncompleteModelError, KeyMatchError
from fastload.options import LoadOptions
from fastload.placement.modules import give
from fastload.plan.keys import KeyRules
from fastload.plan.planning import device_finder, target_dtype
from fastload.plan.rows import LoadPlan
from fastload.plan.slots import Slot
from fastload.reports import collapse_keys

__all__ = ["Initialiser", "finish", "incomplete", "left_empty", "local_part", "placeholder"]

Initialiser = Callable[[nn.Module, str, torch.Tensor], None]
"""Gives one parameter of one module its random first values: (owner, name in the owner, tensor)."""

# Most attributes of a module are of these types; looking at the type alone is what makes the audit cheap.
_PLAIN_TYPES = frozenset({bool, dict, float, int, list, NoneType, OrderedDict, set, str, tuple})


def finish(
    owners: Mapping[str, nn.Module],
    slots: Mapping[str, Slot],
    plan: LoadPlan,
    tensors: Mapping[str, torch.Tensor],
    empty: list[str],
    options: LoadOptions,
    rules: KeyRules,
    initialise: Initialiser | None,
) -> list[str]:
    """Put the tensors into the module, tie, initialise what no file has, audit. Returns what is worth a note."""
    device_of = device_finder(options.device_map)
    made = {fqn: _as_slot(owners, slots[fqn], tensor) for fqn, tensor in tensors.items() if slots[fqn].on_meta}
    for fqn in empty:
        dtype = to_torch(target_dtype(slots[fqn], options.dtype, rules))
        part = torch.empty(slots[fqn].local_shape, dtype=dtype, device=device_of(fqn))
        made[fqn] = _as_slot(owners, slots[fqn], part)
    notes = _tie(slots, plan, made)
    for fqn, tensor in made.items():
        owner, name = _owner(owners, fqn)
        give(owner, name, tensor)
    if initialise is not None:
        with torch.no_grad():
            for fqn in empty:
                initialise(*_owner(owners, fqn), made[fqn])
    _place_computed_buffers(owners, slots, device_of)
    _audit(owners, slots)
    return notes


def left_empty(plan: LoadPlan, slots: Mapping[str, Slot]) -> list[str]:
    """Names on meta that no row fills, directly or through a tie; of a tied group the first name stands for all."""
    placed = [*(row.fqn for row in plan.rows), *(row.fqn for row in plan.fused)]
    filled = {slots[fqn].tied_to or fqn for fqn in placed}
    return [
        fqn
        for fqn, slot in slots.items()
        if slot.on_meta and slot.persistent and slot.tied_to is None and fqn not in filled
    ]


def _as_slot(owners: Mapping[str, nn.Module], slot: Slot, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the kind of object that it replaces: a parameter with its attributes, or a buffer."""
    owner, name = _owner(owners, slot.fqn)
    old = owner._parameters.get(name)
    held = owner._buffers.get(name) if old is None else old
    if held is not None and slot.box is not None:
        from fastload.distributed.layouts import like

        new: torch.Tensor = like(tensor, held)
    elif old is not None:
        new = nn.Parameter(tensor, old.requires_grad and (tensor.is_floating_point() or tensor.is_complex()))
    else:
        return tensor
    if old is not None and old.__dict__:
        new.__dict__.update(old.__dict__)
    return new


def _tie(slots: Mapping[str, Slot], plan: LoadPlan, made: dict[str, torch.Tensor]) -> list[str]:
    """Give every name of a tied group the one parameter, whichever of the names the files had.

    Where the files have two names of a group with different values, each keeps its own: the checkpoint knows better
    than the config. As transformers does.
    """
    groups: dict[str, list[str]] = {}
    for fqn, slot in slots.items():
        if slot.tied_to is not None and slot.on_meta and slot.persistent:
            groups.setdefault(slot.tied_to, [slot.tied_to]).append(fqn)
    regions = {row.fqn: row.spec.region for row in plan.rows}
    notes = []
    for names in groups.values():
        present = [fqn for fqn in names if fqn in made]
        first = present[0]
        for fqn in names:
            is_one_region = fqn in regions and regions[fqn] == regions.get(first)
            if (
                fqn not in made
                or is_one_region
                or _same_bytes(local_part(made[fqn], slots[fqn]), local_part(made[first], slots[first]))
            ):
                made[fqn] = made[first]
            elif slots[fqn].box is not None:
                # Another rank may see no difference in its part, and would go on with another model.
                raise KeyMatchError(
                    "parameters that are one in a distributed module differ in the files",
                    key=f"{first}, {fqn}",
                    fix="build the module without tying them",
                )
            else:
                notes.append(f"{fqn} and {first} are tied in the config but differ in the files: left untied")
    return notes


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))


def _place_computed_buffers(
    owners: Mapping[str, nn.Module], slots: Mapping[str, Slot], device_of: Callable[[str], str]
) -> None:
    """Move the buffers that no file has to the device of the parameters around them."""
    for fqn, slot in slots.items():
        if not slot.persistent and not slot.on_meta and device_of(fqn) != "cpu":
            owner, name = _owner(owners, fqn)
            owner._buffers[name] = owner._buffers[name].to(device_of(fqn))  # type: ignore[union-attr]


def _audit(owners: Mapping[str, nn.Module], slots: Mapping[str, Slot]) -> None:
    """Raise if anything is left on meta: computed buffers, and tensors that are plain attributes of a module.

    Whatever a state dict has was placed, initialised or refused before.
    """
    left = [fqn for fqn, slot in slots.items() if slot.on_meta and not slot.persistent]
    left += [
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in owners.items()
        for name, value in owner.__dict__.items()
        if type(value) not in _PLAIN_TYPES and isinstance(value, torch.Tensor) and value.is_meta
    ]
    if left:
        raise incomplete("computed when the module was built, and built on meta", left)


def incomplete(problem: str, names: list[str]) -> IncompleteModelError:
    return IncompleteModelError(
        f"the model would not be whole: {problem}",
        key=", ".join(collapse_keys(names)),
        expected="a value for every parameter and buffer",
        found=f"{len(names)} without",
        fix="name device='cpu' where a constructor computes a buffer; give parameters that no file has memory first",
    )


def local_part(tensor: torch.Tensor, slot: Slot | None) -> torch.Tensor:
    """What this rank has of a tensor; all of it unless its slot says that it is laid out over ranks."""
    if slot is None or slot.box is None:
        return tensor
    from fastload.distributed.layouts import local

    return local(tensor)


def placeholder(owners: Mapping[str, nn.Module], fqn: str, dtype: torch.dtype) -> torch.Tensor:
    """The tensor on meta that stands for one to come, of the type that it will have."""
    owner, name = _owner(owners, fqn)
    held = owner._parameters.get(name)
    found = owner._buffers[name] if held is None else held
    assert found is not None
    return found.detach().to(dtype)


def _owner(owners: Mapping[str, nn.Module], fqn: str) -> tuple[nn.Module, str]:
    prefix, _, name = fqn.rpartition(".")
    return owners[prefix], name
