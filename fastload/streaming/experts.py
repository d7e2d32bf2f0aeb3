"""Experts of a mixture: of a layer's weights only those that the router chose are read.

Which experts are used is known when their module is called, and what was used lately is likely to be used again: here
keeping the last used is the right policy. Most of those of the next layer can be told before: its router, asked about
the states of this layer, names three of four rightly, since a layer changes little of them (Eliseev and Mazur, "Fast
Inference of Mixture-of-Experts Language Models with Offloading", https://arxiv.org/abs/2312.17238, section 3.2).
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fastload.errors import OptionError
from fastload.plan.rows import Action, FusedRow, PlanRow
from fastload.storage.readahead import Extent
from fastload.streaming.blocks import block_error
from fastload.streaming.pages import FileMappings, MappedPart, fill, let_go, parts_of
from fastload.streaming.reading import Descriptors, ask_for, joined

__all__ = ["RoutedExperts", "routed_rows"]

Row = PlanRow | FusedRow
Expert = tuple[str, int]
"""The name of a module of experts, and the number of one of them."""

_N_DIMS = 3  # experts, outputs, inputs
_NUMBERS = (torch.int64, torch.int32)


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
        files: the files of the rows.
        limit_bytes: most bytes of experts in memory. Those of one call stay until the next one, whatever the limit.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        rows: Mapping[str, Sequence[Row]],
        files: Descriptors,
        limit_bytes: int,
    ) -> None:
        self._files = files
        self._limit_bytes = limit_bytes
        mappings = FileMappings()
        self._parts = {name: _by_expert(modules[name], of_module, mappings) for name, of_module in rows.items()}
        self._next = dict(pairwise(rows))
        self._routers = {name: _router(modules, name, len(self._parts[name])) for name in rows}
        self._asked: set[Expert] = set()
        self._kept: OrderedDict[Expert, int] = OrderedDict()
        self._n_kept_bytes = 0
        self._lock = threading.Lock()
        self.n_read_bytes = 0
        for name in rows:
            modules[name].register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)

    def __reduce__(self) -> str:
        raise OptionError(
            "a model with a memory budget cannot be copied: its experts come and go", fix="load it a second time"
        )

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the forward of a module of experts: those that it uses are there, the next one's on their way."""
        arguments = (*args, *kwargs.values())
        chosen = [(name, number) for number in _chosen(len(self._parts[name]), arguments)]
        with self._lock:
            missing = [expert for expert in chosen if expert not in self._kept]
            try:
                self._ask_for(missing)
                self._ask_for(self._likely(self._next.get(name, ""), arguments))
                # Room is made while the disk reads.
                self._keep(name, chosen)
                fill((part for expert in missing for part in self._of(expert)), self._files)
            except Exception as error:
                self._forget(missing)
                raise block_error(name, error) from error

    def _likely(self, name: str, arguments: Iterable[Any]) -> list[Expert]:
        """The experts that a module is likely to choose; none if there are so many that they push out others."""
        reference = self._routers.get(name)
        router: Any = None if reference is None else reference()
        if router is None:
            return []
        likely = [(name, number) for number in _foreseen(router.weight.detach(), arguments)]
        n_bytes = sum(part.extent.n_bytes for expert in likely for part in self._of(expert))
        return likely if n_bytes <= self._limit_bytes // 2 else []

    def _ask_for(self, experts: Iterable[Expert]) -> None:
        """Have the kernel read what of these is not there; it does so while this thread goes on."""
        new = [expert for expert in experts if expert not in self._kept and expert not in self._asked]
        for extent in joined(part.extent for expert in new for part in self._of(expert)):
            self.n_read_bytes += ask_for(extent, self._files)
        self._asked.update(new)

    def _keep(self, name: str, chosen: Sequence[Expert]) -> None:
        """Count what was asked for of a module as kept, what it chose as used last; let go of what was used first."""
        came = [expert for expert in self._asked if expert[0] == name]
        self._asked.difference_update(came)
        for expert in (*came, *chosen):
            n_bytes = self._kept.pop(expert, None)
            if n_bytes is None:
                n_bytes = sum(part.extent.n_bytes for part in self._of(expert))
                self._n_kept_bytes += n_bytes
            self._kept[expert] = n_bytes
        parts: list[MappedPart] = []
        while self._n_kept_bytes > self._limit_bytes and len(self._kept) > len(chosen):
            expert, n_bytes = self._kept.popitem(last=False)
            self._n_kept_bytes -= n_bytes
            parts += self._of(expert)
        let_go(parts, self._files)

    def _forget(self, experts: Iterable[Expert]) -> None:
        """Take none of these, nor anything that was asked for, to be there."""
        self._asked.clear()
        for expert in experts:
            self._n_kept_bytes -= self._kept.pop(expert, 0)

    def _of(self, expert: Expert) -> list[MappedPart]:
        name, number = expert
        return self._parts[name][number]


def _router(modules: Mapping[str, nn.Module], experts: str, n_experts: int) -> weakref.ref[nn.Module] | None:
    """The module beside a module of experts that scores them: it has a weight with a row for each."""
    for child in modules[experts.rpartition(".")[0]].children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == _N_DIMS - 1 and len(weight) == n_experts:
            return weakref.ref(child)
    return None


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
        if isinstance(argument, torch.Tensor) and argument.dtype in _NUMBERS:
            numbers = torch.unique(argument).tolist()
            return [number for number in numbers if 0 <= number < n_experts]
    return list(range(n_experts))


def _foreseen(weight: torch.Tensor, arguments: Iterable[Any]) -> list[int]:
    """The experts that a router would choose for a call's states: the surest, fewer a token than the call names.

    With all of them a quarter of what is read would be for nothing, while the disk is what a step waits for.
    """
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    chosen = next((tensor for tensor in tensors if tensor.dtype in _NUMBERS), None)
    states = next((tensor for tensor in tensors if tensor.dtype == weight.dtype), None)
    if chosen is None or states is None or states.shape[-1] != weight.shape[-1] or weight.is_meta:
        return []
    n_surest = -(-chosen.shape[-1] * 3 // 4)
    numbers: list[int] = torch.unique(F.linear(states, weight).topk(n_surest).indices).tolist()
    return numbers
