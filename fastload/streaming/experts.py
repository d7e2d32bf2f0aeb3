"""Experts of a mixture: of a layer's weights only those that the router chose are read.

Which experts are used is known when their module is called, and what was used lately is likely to be used again: here
keeping the last used is the right policy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fastload.errors import OptionError
from fastload.plan.rows import Action, FusedRow, PlanRow
from fastload.storage.readahead import Extent
from fastload.streaming.blocks import block_error
from fastload.streaming.pages import FileMappings, MappedPart, let_go, parts_of
from fastload.streaming.reading import Reader, joined

__all__ = ["RoutedExperts", "routed_rows"]

Row = PlanRow | FusedRow
_N_DIMS = 3  # experts, outputs, inputs


def routed_rows(modules: Mapping[str, nn.Module], rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Module of experts -> its rows, as far as each expert's bytes can be told apart and used where they lie."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        owner = row.fqn.rpartition(".")[0]
        is_mapped = row.action in (Action.MAP, Action.REMAP)
        if is_mapped and len(row.spec.shape) == _N_DIMS and "Experts" in type(modules[owner]).__name__:
            found.setdefault(owner, []).append(row)
    return {owner: of_owner for owner, of_owner in found.items() if len({row.spec.shape[0] for row in of_owner}) == 1}


class RoutedExperts:
    """Keeps the experts that were used last, up to a limit, for as long as the model lives.

    Args:
        modules: every module of the model by name; the rows' tensors are in place.
        rows: module of experts -> its rows.
        limit_bytes: most bytes of experts in memory. Those of one call stay until the next one, whatever the limit.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        rows: Mapping[str, Sequence[Row]],
        limit_bytes: int,
    ) -> None:
        self._reader = Reader(scattered=True)
        self._limit_bytes = limit_bytes
        mappings = FileMappings()
        self._parts = {name: _by_expert(modules[name], of_module, mappings) for name, of_module in rows.items()}
        self._kept: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._n_kept_bytes = 0
        self.n_read_bytes = 0
        for name in rows:
            modules[name].register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)

    def __reduce__(self) -> str:
        raise OptionError(
            "a model with a memory budget cannot be copied: its experts come and go", fix="load it a second time"
        )

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        parts = self._parts[name]
        chosen = _chosen(len(parts), (*args, *kwargs.values()))
        missing = [expert for expert in chosen if (name, expert) not in self._kept]
        extents = joined(part.extent for expert in missing for part in parts[expert])
        try:
            self.n_read_bytes += self._reader.read(extents).wait()
        except Exception as error:
            raise block_error(name, error) from error
        for expert in chosen:
            n_bytes = self._kept.pop((name, expert), None)
            if n_bytes is None:
                n_bytes = sum(part.extent.n_bytes for part in parts[expert])
                self._n_kept_bytes += n_bytes
            self._kept[name, expert] = n_bytes
        self._let_go(len(chosen))

    def _let_go(self, n_in_use: int) -> None:
        parts: list[MappedPart] = []
        while self._n_kept_bytes > self._limit_bytes and len(self._kept) > n_in_use:
            (name, expert), n_bytes = self._kept.popitem(last=False)
            self._n_kept_bytes -= n_bytes
            parts += self._parts[name][expert]
        let_go(parts)


def _by_expert(module: nn.Module, rows: Sequence[Row], mappings: FileMappings) -> list[list[MappedPart]]:
    """The parts of each expert, over all rows of its module."""
    n_experts = rows[0].spec.shape[0]
    experts: list[list[MappedPart]] = [[] for _ in range(n_experts)]
    for row in rows:
        tensor: torch.Tensor = getattr(module, row.fqn.rpartition(".")[2]).detach()
        expert_bytes = tensor.nbytes // n_experts
        for (file, offset, n_bytes), address in parts_of(row, tensor, mappings):
            at = address - tensor.data_ptr()
            end = at + n_bytes
            while at < end:
                expert = at // expert_bytes
                n = min(end, (expert + 1) * expert_bytes) - at
                source = offset + at - (address - tensor.data_ptr())
                experts[expert].append(MappedPart(Extent(file, source, n), tensor.data_ptr() + at))
                at += n
    return experts


def _chosen(n_experts: int, arguments: Iterable[Any]) -> list[int]:
    """The experts that a call names in a tensor of their numbers; all of them where no argument is one."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.dtype in (torch.int64, torch.int32):
            numbers = torch.unique(argument).tolist()
            return [number for number in numbers if 0 <= number < n_experts]
    return list(range(n_experts))
