"""What a module wants filled: its parameters and buffers, described.

Slots are data. Plans are made from them without touching the module, its device or any file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fastload.dtypes import DType, from_torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Slot", "describe_module"]


class Slot(NamedTuple):
    """One named tensor of a module.

    Attributes:
        fqn: fully qualified name in the module.
        dtype: type it was built with.
        shape: its shape.
        persistent: whether a state dict has it. A buffer that is not persistent is computed, never loaded.
        tied_to: the first name under which the module holds the same parameter object; None for that first name.
        on_meta: whether it has no values yet.
    """

    fqn: str
    dtype: DType
    shape: tuple[int, ...]
    persistent: bool = True
    tied_to: str | None = None
    on_meta: bool = True


def describe_module(module: nn.Module) -> dict[str, Slot]:
    """The slots of a module by name, in the order of its modules. A tied parameter appears under each name."""
    slots: dict[str, Slot] = {}
    first_names: dict[int, str] = {}
    for prefix, submodule in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        transient = submodule._non_persistent_buffers_set
        for owned in (submodule._parameters, submodule._buffers):
            for name, tensor in owned.items():
                if tensor is None:
                    continue
                fqn = dot + name
                first = first_names.setdefault(id(tensor), fqn)
                slots[fqn] = Slot(
                    fqn,
                    from_torch(tensor.dtype),
                    tuple(tensor.shape),
                    persistent=owned is submodule._parameters or name not in transient,
                    tied_to=first if first != fqn else None,
                    on_meta=tensor.is_meta,
                )
    return slots
