"""The blocks of a model: what it runs through in order, and what can come and go as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from fastload.errors import BlockError

__all__ = ["REST", "Units", "block_classes", "block_error", "find_units"]

# The unit of everything that is in no block: embeddings, the last norm, heads.
REST = ""


class Units(NamedTuple):
    """A model divided.

    Attributes:
        names: of the units in the order in which a forward uses them: `REST`, then the blocks by their names.
        of_module: name of a module -> the unit it belongs to; modules that hold blocks belong to `REST`.
    """

    names: tuple[str, ...]
    of_module: dict[str, str]

    def of_tensor(self, fqn: str) -> str:
        """The unit of a parameter or buffer."""
        return self.of_module[fqn.rpartition(".")[0]]


def find_units(modules: Mapping[str, nn.Module]) -> Units:
    """Blocks are the children of a ModuleList or Sequential that has several of one class with parameters.

    Args:
        modules: every module by name, parents first (see `walk_modules`).
    """
    names: list[str] = [REST]
    of_module: dict[str, str] = {}
    for name, module in modules.items():
        inherited = of_module.get(name.rpartition(".")[0], REST) if name else REST
        of_module[name] = of_module.get(name, inherited)
        if of_module[name] == REST and isinstance(module, nn.ModuleList | nn.Sequential) and _repeats(module):
            for child in module._modules:
                block = f"{name}.{child}" if name else child
                of_module[block] = block
                names.append(block)
    return Units(tuple(names), of_module)


def block_classes(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the classes whose modules are blocks."""
    return {type(modules[unit]).__name__ for unit in find_units(modules).names if unit != REST}


def _repeats(module: nn.Module) -> bool:
    children = [child for child in module._modules.values() if child is not None]
    return (
        len(children) > 1
        and len({type(child) for child in children}) == 1
        and all(next(child.parameters(), None) is not None for child in children)
        # A list of plain layers (the heads of a model, say) is not run through in order.
        and any(child._modules for child in children)
    )


def block_error(unit: str, error: Exception) -> BlockError:
    """What is raised in a forward, or by `wait`, when the weights of a unit, or a module of experts, cannot be had."""
    return BlockError(
        "the weights of a block could not be read",
        file=getattr(error, "file", None),
        key=unit or "the parts outside of blocks",
        found=str(error),
        fix="load the model again once its files can be read",
    )
