"""What a module wants filled: its parameters and buffers, described.

Slots are data. Plans are made from them without touching the module, its device or any file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from fastload.dtypes import DType, from_torch
from fastload.plan.boxes import Box

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Slot", "describe_modules", "walk_modules"]


class Slot(NamedTuple):
    """One named tensor of a module.

    Attributes:
        fqn: fully qualified name in the module.
        dtype: type it was built with.
        shape: its shape.
        persistent: whether a state dict has it. A buffer that is not persistent is computed, never loaded.
        tied_to: the first name under which the module holds the same parameter object; None for that first name.
        on_meta: whether it has no values yet.
        box: the part of it that this rank owns, if it is laid out over several; None for all of it.
    """

    fqn: str
    dtype: DType
    shape: tuple[int, ...]
    persistent: bool = True
    tied_to: str | None = None
    on_meta: bool = True
    box: Box | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of what this rank owns."""
        return self.shape if self.box is None else self.box.shape


def walk_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Every module below and including this one by name, parents first; a shared module under each of its names.

    What ``dict(module.named_modules(remove_duplicate=False))`` gives, without its generator per level: a load walks
    a model of thousands of modules several times.
    """
    found: dict[str, nn.Module] = {}
    pending = [("", module)]
    while pending:
        prefix, current = pending.pop()
        found[prefix] = current
        children = current._modules
        if children:
            dot = f"{prefix}." if prefix else ""
            pending += [(dot + name, child) for name, child in reversed(children.items()) if child is not None]
    return found


def describe_modules(modules: Mapping[str, nn.Module]) -> dict[str, Slot]:
    """The slots of walked modules by name, in their order. A tied parameter appears under each of its names."""
    slots: dict[str, Slot] = {}
    first_names: dict[int, str] = {}
    for prefix, module in modules.items():
        dot = f"{prefix}." if prefix else ""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                fqn = dot + name
                slots[fqn] = _slot(fqn, tensor, True, first_names.setdefault(id(tensor), fqn))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                fqn = dot + name
                persistent = name not in module._non_persistent_buffers_set
                slots[fqn] = _slot(fqn, buffer, persistent, first_names.setdefault(id(buffer), fqn))
    return slots


def _slot(fqn: str, tensor: torch.Tensor, persistent: bool, first_name: str) -> Slot:
    tied_to = first_name if first_name != fqn else None
    return Slot(fqn, from_torch(tensor.dtype), tuple(tensor.shape), persistent, tied_to, tensor.is_meta)
