"""What a device map leaves on the CPU or on disk beside accelerators: it passes to where it computes, block by block.

Where modules lie on several devices, hooks of accelerate's kind take inputs from one to the next. What accelerate's own
would bring of weights, one tensor after the other in the forward that needs it, comes instead a block at a time, from
the files through pinned memory, while the block before computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastload.placement.device import Staging
from fastload.placement.device_map import main_device
from fastload.placement.placing import place_all
from fastload.plan.planning import device_finder
from fastload.plan.rows import Action, FusedRow, LoadPlan, PlanRow
from fastload.plan.slots import walk_modules
from fastload.plan.staging import can_be_staged
from fastload.storage.mapping import MappedFile
from fastload.streaming.ahead import Ahead
from fastload.streaming.blocks import block_classes, find_units
from fastload.streaming.deferring import plan_of
from fastload.streaming.pages import extents_of
from fastload.streaming.reading import Descriptors

if TYPE_CHECKING:
    from fastload.streaming.hooks import Passing

__all__ = ["bring_by_blocks", "install_hooks", "is_reached", "names_passing"]

Row = PlanRow | FusedRow


def names_passing(
    modules: Mapping[str, nn.Module],
    plan: LoadPlan,
    device_map: Mapping[str, str],
    tied: Mapping[str, str | None],
    staging: Staging,
) -> frozenset[str]:
    """The parameters of a plan that need no memory of their own: they come from the files for each forward.

    They are meant for the CPU beside an accelerator that staging reaches, and can come as they lie in the files. One
    that is tied to a tensor that stays is that tensor. Buffers are small, and forwards write to them: they stay where
    their module computes.

    Args:
        modules: every module of the model by name.
        plan: the plan of the load.
        device_map: module name -> device, "cpu" for what is on disk too.
        tied: name -> the first name of the same tensor; None for that first name.
        staging: how rows reach accelerators.

    Raises:
        OptionError: there is no such accelerator.
    """
    accelerator = main_device(device_map)
    if accelerator is None or staging.devices(accelerator) is None:
        return frozenset()
    device_of = device_finder(device_map)
    staying = {tied.get(fqn) or fqn for fqn in tied if device_of(fqn) != "cpu"}
    staying |= {tied.get(row.fqn) or row.fqn for row in plan.all_rows if row.device != "cpu" or not can_be_staged(row)}
    return frozenset(
        row.fqn
        for row in plan.all_rows
        if (tied.get(row.fqn) or row.fqn) not in staying and _is_parameter(modules, row.fqn)
    )


def install_hooks(
    model: nn.Module,
    device_map: Mapping[str, str],
    passing: LoadPlan,
    open_file: Callable[[str], MappedFile],
    staging: Staging,
) -> tuple[str, ...]:
    """Have a model that lies on several devices compute, and what passes come to it.

    Args:
        model: the model, finished; what passes is on meta.
        device_map: module name -> device: no module of it holds another one.
        passing: the rows of what passes.
        open_file: path -> the mapped file.
        staging: how rows reach accelerators.

    Returns:
        A note for the report.
    """
    held = _names_by_tensor(model)
    rows = {name: row for row in passing.all_rows for name in held[id(_tensor(model, row.fqn))]}
    in_memory: dict[str, torch.Tensor] = {}
    weights = _OutOfFiles(rows, in_memory, open_file)
    from fastload.streaming.hooks import add_hooks

    found = add_hooks(model, device_map, block_classes(walk_modules(model)), weights, in_memory)
    bring_by_blocks(model, found, rows.get, staging, Descriptors(weights.files, staging.path_of), keep_ties=True)
    if not rows:
        return ()
    return (f"{len(rows)} tensors stay in the files: a forward brings them, a block while the one before computes",)


def is_reached(device: torch.device, staging: Staging) -> bool:
    """Whether what computes on a device can have its weights a block ahead."""
    return device == torch.device("cpu") or staging.devices(str(device)) is not None


def bring_by_blocks(
    model: nn.Module,
    found: Mapping[str, Passing],
    row_of: Callable[[str], Row | None],
    staging: Staging,
    files: Descriptors,
    *,
    keep_ties: bool = False,
) -> None:
    """Have modules of a dispatched model take their weights from what comes a block ahead.

    Args:
        model: the model.
        found: name -> the module and accelerate's hook, which is replaced.
        row_of: name of a tensor -> its row, if it comes from the files.
        staging: how rows reach accelerators.
        files: the files, held.
        keep_ties: as for `replace_hooks`.
    """
    from fastload.streaming.hooks import replace_hooks

    units = find_units(walk_modules(model))
    unit_of = {prefix: units.of_module[prefix] or prefix for prefix in found}
    of_unit: dict[str, list[Row]] = {unit: [] for unit in unit_of.values()}
    for prefix, unit in unit_of.items():
        of_unit[unit] += _bound(found[prefix], row_of, staging)
    ahead = Ahead(of_unit, staging, files)
    replace_hooks(((prefix, unit, found[prefix]) for prefix, unit in unit_of.items()), ahead.take, keep_ties=keep_ties)


def _bound(passing: Passing, row_of: Callable[[str], Row | None], staging: Staging) -> Iterator[Row]:
    """The rows of what a hook brings, bound for where it computes."""
    device = str(passing.device)
    is_staged = staging.devices(device) is not None
    for name in passing.names:
        row = row_of(name)
        if row is not None:
            named = row._replace(fqn=name)
            yield named._replace(device=device, action=Action.MOVE) if is_staged else named


class _OutOfFiles(Mapping[str, torch.Tensor]):
    """The weights by name, for hooks and for what saves a model: made of the files when they are asked for.

    Attributes:
        files: the files, which this holds.

    Args:
        rows: name -> its row, bound for the CPU.
        in_memory: the tensors that are in no file as they are needed.
        open_file: path -> the mapped file.
    """

    def __init__(
        self, rows: Mapping[str, Row], in_memory: Mapping[str, torch.Tensor], open_file: Callable[[str], MappedFile]
    ) -> None:
        self._rows = rows
        self._in_memory = in_memory
        self.files = {extent.file: open_file(extent.file) for row in rows.values() for extent in extents_of(row)}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._in_memory:
            return self._in_memory[name]
        row = self._rows[name]
        for extent in extents_of(row):
            self.files[extent.file].check()
        # A forward under inference mode must leave nothing in the open files that a later one could not use.
        with torch.inference_mode(False), torch.no_grad():
            placed = place_all(plan_of([row]), self.files.__getitem__, Staging(lambda device: None), title=name)
            return placed.tensors[row.fqn]

    def __contains__(self, name: object) -> bool:
        return name in self._in_memory or name in self._rows

    def __iter__(self) -> Iterator[str]:
        yield from self._in_memory
        yield from (name for name in self._rows if name not in self._in_memory)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OutOfFiles:
        """Copies of a model share it: it is only read."""
        return self


def _is_parameter(modules: Mapping[str, nn.Module], fqn: str) -> bool:
    owner, _, name = fqn.rpartition(".")
    return name in modules[owner]._parameters


def _names_by_tensor(model: nn.Module) -> dict[int, list[str]]:
    """Every name of a tensor: several, if it is tied."""
    found: dict[int, list[str]] = {}
    for prefix, module in walk_modules(model).items():
        dot = f"{prefix}." if prefix else ""
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append(dot + name)
    return found


def _tensor(model: nn.Module, fqn: str) -> torch.Tensor:
    owner, _, name = fqn.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(owner), name)
    return tensor
