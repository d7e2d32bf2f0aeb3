"""What a device map leaves on disk, or on the CPU beside an accelerator: read from the files when a forward needs it.

The hooks of accelerate ask a map of weights for a module's parameters before its forward, and forget them after it.
transformers gives them a map that opens a file anew for every parameter of every forward, and before that saves once
more whatever is not in a safetensors file as the model needs it. Here the map is the plan itself: a row is carried out
when it is asked for. A tensor that needs no change is a view of its file, which is mapped once; one that is fused or
converted is made for the forward, and dies after it. The hooks themselves are replaced (`fastload.streaming.hooks`)
by some that bring a block while the one before computes.

What lies on the CPU beside an accelerator is left in the files too, and comes through pinned memory from the page
cache: a copy in memory would not bring it there any faster. It is read into memory where the files come over a network,
and what is no run of bytes in a file is made there once.
"""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from transformers.integrations.accelerate import expand_device_map

from fastload.checkpoint import Checkpoint
from fastload.dtypes import to_torch
from fastload.errors import FastloadError
from fastload.formats.specs import TensorSpec
from fastload.hf.planning import WeightPlan
from fastload.hf.renaming import Source
from fastload.placement.cpu import place
from fastload.placement.device import Staging
from fastload.placement.fused import place_fused, remap
from fastload.plan.keys import KeyMatch
from fastload.plan.rows import Action, FusedRow, LoadPlan, PlanRow
from fastload.plan.staging import can_be_staged
from fastload.storage.devices import Devices
from fastload.storage.mapping import MappedFile, open_unchanged
from fastload.storage.residency import file_system
from fastload.storage.slabs import Slab
from fastload.streaming.pages import extents_of
from fastload.streaming.passing import bring_by_blocks, is_reached
from fastload.streaming.reading import Descriptors

__all__ = ["Convert", "DiskWeights", "Left", "OpenFile", "names_left", "split_plan", "without_file"]

OpenFile = Callable[[str], MappedFile]
Convert = Callable[[Source, OpenFile], Mapping[str, torch.Tensor]]
"""What transformers' own operations make of a source."""

_NO_KEYS = KeyMatch({}, (), (), ())
_WITHOUT_FILE = {Action.REMAP: Action.GATHER, Action.CAST: Action.MOVE}
# Here an open file can be opened once more, whatever has taken its name.
_DESCRIPTORS = "/proc/self/fd"


class Left(NamedTuple):
    """The tensors that get no memory.

    Attributes:
        on_disk: the device map means them for disk.
        passing: it means them for the CPU, and there is an accelerator beside it.
    """

    on_disk: frozenset[str]
    passing: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return self.on_disk | self.passing

    def __bool__(self) -> bool:
        return bool(self.on_disk or self.passing)


def names_left(
    model: Any, wanted: Mapping[str, Any], asked: Any, checkpoint: Checkpoint | None, devices: Devices
) -> Left:
    """The tensors that a device map leaves out of memory, but for one that is tied to a tensor in memory: it is that.

    Args:
        model: the model, built.
        wanted: its state dict.
        asked: transformers' LoadStateDictConfig.
        checkpoint: the files; None for a state dict in memory.
        devices: the accelerator of a name.
    """
    ties: dict[str, set[str]] = defaultdict(set)
    for target, source in model.all_tied_weights_keys.items():
        ties[source] |= {target, source}

    def of(device: str) -> frozenset[str]:
        meant = _meant_for(device, model, wanted, asked)
        return meant.difference(*(tied for tied in ties.values() if not tied <= meant)) if meant else meant

    is_passing = checkpoint is not None and _has_accelerator(asked, devices) and not _is_remote(checkpoint)
    return Left(of("disk"), of("cpu") if is_passing else frozenset())


def split_plan(weights: WeightPlan, left: Left) -> tuple[WeightPlan, list[PlanRow | FusedRow], Left]:
    """The plan without the rows of tensors that are left, and these rows. Conversions stay in the plan.

    What is to come from the CPU and cannot come as it lies in the files is not left, but made in memory once.
    """
    if not left:
        return weights, [], left
    plan = weights.plan
    passing = {row.fqn for row in plan.all_rows if row.fqn in left.passing and can_be_staged(row)}
    left = left._replace(passing=frozenset(passing))
    names = left.names
    apart = [row for row in plan.all_rows if row.fqn in names]
    rows = tuple(row for row in plan.rows if row.fqn not in names)
    fused = tuple(row for row in plan.fused if row.fqn not in names)
    return replace(weights, plan=replace(plan, rows=rows, fused=fused)), apart, left


_Row = TypeVar("_Row", PlanRow, FusedRow, PlanRow | FusedRow)


def without_file(row: _Row) -> _Row:
    """A row for tensors that are in memory: no pages of a file can be laid side by side, none cast batch by batch."""
    return row._replace(action=_WITHOUT_FILE.get(row.action, row.action))


class DiskWeights(Mapping[str, torch.Tensor]):
    """The weights that accelerate's hooks ask for, by name.

    Its files are held: they stay what they are, whatever takes their names, until this ends with the model.

    Attributes:
        index: what transformers' offload index would say; other libraries look into it. Of a tensor that is in no
            safetensors file as the model needs it, it does not say the key.

    Args:
        rows: the plan for these tensors.
        sources: name -> what transformers' own operations make the tensor of.
        specs: the files' tensors by key.
        files: the checkpoint; or what opens "the file" of a state dict in memory.
        convert: runs these operations.
        staging: how rows reach accelerators.
    """

    def __init__(
        self,
        rows: Iterable[PlanRow | FusedRow],
        sources: Mapping[str, Source],
        specs: Mapping[str, TensorSpec],
        files: Checkpoint | OpenFile,
        convert: Convert,
        staging: Staging,
    ) -> None:
        self._rows: dict[str, PlanRow | FusedRow] = {row.fqn: row for row in rows}
        self._rows_of_files = dict(self._rows) if isinstance(files, Checkpoint) else {}
        self._staging = staging
        self._sources = dict(sources)
        self._convert = convert
        self._device = torch.device("cpu")
        self._is_sent_on = False
        self._in_memory: dict[str, torch.Tensor] = {}
        self._same_as: dict[str, str] = {}
        self._apart: dict[str, MappedFile] = {}
        self._buffers: frozenset[str] = frozenset()
        self.index = {name: _index_entry(row, specs) for name, row in self._rows.items()}
        self.index |= {name: _source_entry(source, specs) for name, source in sources.items()}
        self._files: dict[str, MappedFile] = {}
        self._real_name: dict[str, str] = {}
        if isinstance(files, Checkpoint):
            self._open_file: OpenFile = self._files.__getitem__
            self._held = Descriptors(_files_of(self._rows.values()), files.held_path)
            keys = [key for source in sources.values() for matched in source.keys.values() for key in matched]
            self._hold([specs[key] for key in keys], files)
        else:
            self._open_file = files
            self._rows = {name: without_file(row) for name, row in self._rows.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """For the report of the load."""
        return (f"{len(self)} tensors stay in the files: a forward brings them, a block while the one before computes",)

    def keep(self, model: Any, asked: Any) -> None:
        """Keep in memory what is meant for disk and in no file, now that the load has given it values.

        It was initialised, or is tied to a tensor in memory. In transformers the forward then fails.
        """
        state = model.state_dict(keep_vars=True)
        name_of = {id(state[name]): name for name in (*self._rows, *self._sources)}
        on_disk = _meant_for("disk", model, state, asked)
        for name in (on_disk | _meant_for("cpu", model, state, asked)).difference(self._rows, self._sources):
            if not state[name].is_meta:
                if name in on_disk:
                    self._in_memory[name] = state[name].detach()
                    self.index[name] = {}
            elif id(state[name]) in name_of:
                self._same_as[name] = name_of[id(state[name])]
                self.index[name] = self.index[self._same_as[name]]
        self._buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
        self._map_apart()

    def attach(self, model: torch.nn.Module) -> None:
        """Have the hooks of a dispatched model ask here: they share one loader, which asks its state dict first.

        Those that bring weights to a CPU, or to an accelerator that staging reaches, are replaced.
        """
        from fastload.streaming.hooks import offloading_hooks

        found = dict(offloading_hooks(model))
        if not found:
            return
        loader = next(iter(found.values())).hook.weights_map.dataset
        self._in_memory |= {name: tensor for name, tensor in loader.state_dict.items() if not tensor.is_meta}
        self._device = torch.device("cpu" if loader.device is None else loader.device)
        loader.state_dict = self
        self._is_sent_on = any(passing.device.type != "cpu" for passing in found.values())
        reached = {prefix: one for prefix, one in found.items() if is_reached(one.device, self._staging)}
        if self._rows_of_files and reached:
            rows_of_files, same_as = self._rows_of_files, self._same_as
            bring_by_blocks(
                model, reached, lambda name: rows_of_files.get(same_as.get(name, name)), self._staging, self._held
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._in_memory.get(name)
        if tensor is not None:
            return tensor
        # A forward under inference mode must leave nothing in the open files that a later one could not use.
        with torch.inference_mode(False), torch.no_grad():
            row = self._rows.get(self._same_as.get(name, name))
            tensor = self._converted(name) if row is None else self._placed(row, self._apart.get(name))
            is_of_file = row is None or row.action in (Action.MAP, Action.REMAP)
            if is_of_file and (name in self._buffers or self._is_sent_on or self._device.type != "cpu"):
                # Forwards write to buffers, and do not mean the next one to see it. And a driver that copies from
                # a private mapping breaks its copy-on-write first, page by page.
                tensor = tensor.clone()
            return tensor.to(self._device)

    def __contains__(self, name: object) -> bool:
        return name in self.index or name in self._in_memory

    def __iter__(self) -> Iterator[str]:
        return iter(self.index | self._in_memory)

    def __len__(self) -> int:
        return len(self.index | self._in_memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskWeights:
        """Copies of a model share it: it is only read."""
        return self

    def _converted(self, name: str) -> torch.Tensor:
        first = self._same_as.get(name, name)
        return self._convert(self._sources[first], self._open_file)[first]

    def _placed(self, row: PlanRow | FusedRow, apart: MappedFile | None) -> torch.Tensor:
        if isinstance(row, FusedRow):
            with self._real_names():
                if row.action is Action.REMAP:
                    return remap(row)[0]
                plan, destination = LoadPlan((), _NO_KEYS, fused=(row,)), {row.fqn: _fresh(row)}
                return place_fused(plan, self._open_file, destination)[0][row.fqn]
        if apart is not None:
            return apart.tensor(row.spec)
        tensor = place(LoadPlan((row,), _NO_KEYS), self._open_file, title=row.fqn)[row.fqn]
        if row.action in (Action.COPY, Action.DECODE):
            # The file remembers what it had to copy.
            self._open_file(row.spec.region.file).release(row.spec.region)
        return tensor

    def _map_apart(self) -> None:
        """Map once more what is a tensor under several names: writers refuse tensors that are the same memory."""
        seen = set()
        for name in self.index:
            row = self._rows.get(self._same_as.get(name, name))
            if isinstance(row, PlanRow) and row.action is Action.MAP and row.spec.region.file in self._files:
                file, offset_bytes, n_bytes, _ = row.spec.region
                where = (row.spec.region, row.spec.view)
                if where in seen:
                    self._apart[name] = MappedFile(file, offset_bytes + n_bytes)
                seen.add(where)

    def _hold(self, converted: Iterable[TensorSpec], checkpoint: Checkpoint) -> None:
        """Map the files once, and open those whose pages will be laid side by side, under a path that stays good."""
        specs = list(converted)
        paths: dict[str, str] = {}
        for name, row in self._rows.items():
            if not isinstance(row, FusedRow):
                specs.append(row.spec)
                continue
            if row.action is Action.REMAP and os.path.isdir(_DESCRIPTORS):
                for piece in row.spec.pieces:
                    file = piece.spec.region.file
                    if file not in paths:
                        paths[file] = self._path_of_its_own(file, checkpoint)
                self._rows[name] = _moved(row, paths)
                continue
            specs += [piece.spec for piece in row.spec.pieces]
            self._rows[name] = row._replace(action=Action.GATHER)
        for path in {spec.region.file for spec in specs}:
            self._files[path] = MappedFile(path, checkpoint.n_file_bytes(path), checkpoint.modified_ns(path))

    def _path_of_its_own(self, path: str, checkpoint: Checkpoint) -> str:
        descriptor = open_unchanged(path, checkpoint.n_file_bytes(path), checkpoint.modified_ns(path))
        weakref.finalize(self, os.close, descriptor)
        own = f"{_DESCRIPTORS}/{descriptor}"
        self._real_name[own] = path
        return own

    @contextmanager
    def _real_names(self) -> Iterator[None]:
        """Has errors name a file as the caller knows it."""
        try:
            yield
        except FastloadError as error:
            if error.file in self._real_name:
                own, error.file = error.file, self._real_name[error.file]
                error.args = (str(error).replace(own, error.file), *error.args[1:])
            raise


def _has_accelerator(asked: Any, devices: Devices) -> bool:
    """Whether a device map names an accelerator that staging reaches. OptionError if it is not there."""
    named = {device for device in (asked.device_map or {}).values() if str(device) not in ("cpu", "disk")}
    return any(devices(str(torch.device(device))) is not None for device in named)


def _is_remote(checkpoint: Checkpoint) -> bool:
    return any(file_system(file).is_network for file in checkpoint.files)


def _meant_for(device: str, model: Any, names: Mapping[str, Any], asked: Any) -> frozenset[str]:
    """What accelerate's hooks will ask for, of a device; buffers only if these are to be offloaded too."""
    if device not in map(str, (asked.device_map or {}).values()):
        return frozenset()
    devices = expand_device_map(asked.device_map, list(names))
    meant = {name for name, value in names.items() if str(devices[name]) == device and isinstance(value, torch.Tensor)}
    if not asked.offload_buffers:
        meant.difference_update(name for name, _ in model.named_buffers(remove_duplicate=False))
    return frozenset(meant)


def _files_of(rows: Iterable[PlanRow | FusedRow]) -> set[str]:
    return {extent.file for row in rows for extent in extents_of(row)}


def _index_entry(row: PlanRow | FusedRow, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    spec = row.spec.pieces[0].spec if isinstance(row, FusedRow) else row.spec
    entry = {"safetensors_file": spec.region.file, "dtype": str(to_torch(row.dtype)).removeprefix("torch.")}
    is_as_needed = specs[spec.key] == row.spec and spec.region.file.endswith(".safetensors")
    return entry | {"weight_name": spec.key} if is_as_needed else entry


def _source_entry(source: Source, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    key = next(key for keys in source.keys.values() for key in keys)
    return {"safetensors_file": specs[key].region.file}


def _fresh(row: FusedRow) -> torch.Tensor:
    """Memory that goes back to the system when the tensor dies; an allocator might keep it for what comes next."""
    n_elements = prod(row.spec.shape)
    return Slab(max(1, n_elements * row.dtype.itemsize)).tensor(row.dtype, 0, n_elements).view(row.spec.shape)


def _moved(row: FusedRow, paths: Mapping[str, str]) -> FusedRow:
    """A row whose pieces are in files of other paths."""
    pieces = []
    for piece in row.spec.pieces:
        region = piece.spec.region
        pieces.append(piece._replace(spec=piece.spec._replace(region=region._replace(file=paths[region.file]))))
    return row._replace(spec=row.spec._replace(pieces=tuple(pieces)))
