"""Placing rows on accelerators: memory there, and a transfer that fills it, for every device at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from fastload.errors import OptionError
from fastload.options import PINNED_BYTES
from fastload.plan.rows import Action, FusedRow, LoadPlan, PlanRow
from fastload.plan.staging import Limits, StagingPlan, Wanted, can_be_staged, plan_staging, wanted_of
from fastload.progress import Progress
from fastload.reports import format_bytes
from fastload.storage.crew import Crew, Start, start_thread
from fastload.storage.devices import Device, Devices
from fastload.storage.ring import Ring, pin_ahead
from fastload.storage.staging import Transfer, typed
from fastload.storage.windows import Windows

__all__ = [
    "Prepared",
    "Staged",
    "Staging",
    "begin_all",
    "begin_pinning",
    "has_staged_rows",
    "place_on_devices",
    "prepare_all",
    "stage",
    "stage_all",
]

Row = PlanRow | FusedRow


class Staging(NamedTuple):
    """How rows reach accelerators.

    Attributes:
        devices: the device of a name.
        pinned_bytes: most pinned host memory for each device.
        limits: sizes of chunks and buffers.
        path_of: file -> the path to open it by, if its name may come to be another file's (`Checkpoint.held_path`).
        start: begins the threads of a transfer.
    """

    devices: Devices
    pinned_bytes: int = PINNED_BYTES
    limits: Limits = Limits()
    path_of: Callable[[str], str] = str
    start: Start = start_thread

    def for_blocks(self) -> Staging:
        """For one small transfer after another, two at a time, which share what may be pinned and keep their threads.

        The threads end with what is returned.
        """
        pinned_bytes = max(self.pinned_bytes // 2, 2 * self.limits.chunk_bytes)
        return self._replace(pinned_bytes=pinned_bytes, start=Crew().start)

    @property
    def n_slots(self) -> int:
        """Slots of a ring. Raises OptionError where there would not be one to read into and one to send."""
        n_slots = self.pinned_bytes // self.limits.chunk_bytes
        if n_slots < 2:
            raise OptionError(
                "too little pinned memory for a load to an accelerator",
                expected=f"at least {format_bytes(2 * self.limits.chunk_bytes)}",
                found=format_bytes(self.pinned_bytes),
                fix="pass a larger pinned_memory, or none for the usual size",
            )
        return n_slots


class Prepared(NamedTuple):
    """What staging is to do, as often as it is begun.

    Attributes:
        device: where to.
        plan: the memory there, and the chunks that fill it.
    """

    device: Device
    plan: StagingPlan


class Staged(NamedTuple):
    """Tensors on a device, and the transfer that fills them.

    Attributes:
        tensors: by name. Their values are there when the transfer, or their group of it, has been waited for.
        transfer: what is under way.
    """

    tensors: dict[str, torch.Tensor]
    transfer: Transfer


def place_on_devices(
    plan: LoadPlan, staging: Staging, existing: Mapping[str, torch.Tensor], title: str = "loading"
) -> tuple[LoadPlan, dict[str, torch.Tensor], tuple[str, ...]]:
    """Place the rows of a plan that staging can bring to accelerators.

    Args:
        plan: what to do.
        staging: how.
        existing: the module's own tensors, for rows that fill memory that is there.
        title: label of the progress bar.

    Returns:
        The plan of the rows that are left, the tensors by name, and a note for each device on how they were read.

    Raises:
        OptionError: a device is not there, or there is too little pinned memory.
        DeviceMemoryError: a device has too little memory. All that was taken is free again.
        TruncatedFileError, UnreadableFileError: a file cannot be read.
    """
    rows = _by_device(plan.all_rows, staging, existing)
    if not rows:
        return plan, {}, _notes_of_unstaged(plan, staging)
    total_bytes = sum(_n_file_bytes(row) for _, of_device in rows.values() for row in of_device)
    placed: dict[str, torch.Tensor] = {}
    with Progress(title, total_bytes) as progress, ExitStack() as transfers:
        counting = threading.Lock()

        def advance(n_bytes: int) -> None:
            with counting:
                progress.advance(n_bytes)

        under_way = []
        for device, of_device in rows.values():
            staged = stage(of_device, device, staging, existing, advance=advance)
            # Whatever happens to one of them, the others end before this returns.
            under_way.append(transfers.enter_context(staged.transfer))
            placed |= staged.tensors
        for transfer in under_way:
            transfer.wait()
    left = replace(
        plan,
        rows=tuple(row for row in plan.rows if row.fqn not in placed),
        fused=tuple(row for row in plan.fused if row.fqn not in placed),
    )
    return left, placed, (*(transfer.note for transfer in under_way), *_notes_of_unstaged(left, staging))


def stage(
    rows: Iterable[Row],
    device: Device,
    staging: Staging,
    existing: Mapping[str, torch.Tensor] | None = None,
    *,
    group_of: Callable[[str], int] = lambda fqn: 0,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Staged:
    """Make the tensors of rows on one device and begin to fill them.

    Args:
        rows: rows that `can_be_staged`.
        device: where.
        staging: how.
        existing: memory that is there, for rows that fill it: contiguous, and of the row's type.
        group_of: name -> group: the lower ones arrive first, and each can be waited for. By block, for example.
        advance: called on another thread with the bytes of each chunk that was sent.

    Raises:
        DeviceMemoryError: the device has too little memory; nothing has begun.
    """
    return _begin(_prepare(rows, device, staging, group_of), staging, existing or {}, advance)


def _prepare(rows: Iterable[Row], device: Device, staging: Staging, group_of: Callable[[str], int]) -> Prepared:
    return Prepared(device, plan_staging(wanted_of(rows, group_of, lambda row: not row.device), staging.limits))


def _begin(
    prepared: Prepared,
    staging: Staging,
    held: Mapping[str, torch.Tensor],
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Staged:
    device, plan = prepared
    n_slots = staging.n_slots
    # What is made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        buffers, scratch = _memory(plan, device, held)
        tensors: dict[str, torch.Tensor] = {}
        for one, place in zip(plan.wanted, plan.places, strict=True):
            for name in one.names:
                made = held[name] if one.is_given else typed(buffers[place.buffer], one.dtype, place[1], one.shape)
                tensors[name] = made
        # What may be pinned is for slots, or for half of them and for pages of files as they lie.
        n_least = max(2, n_slots // 2)
        most_bytes = staging.pinned_bytes - n_least * staging.limits.chunk_bytes
        windows = Windows(device, plan.chunks, most_bytes, staging.path_of)
        n_slots = n_least if windows.is_possible else n_slots
        ring = Ring(device, staging.limits.chunk_bytes, min(n_slots, len(plan.chunks)))
        transfer = Transfer(
            device, plan.chunks, buffers, scratch, ring, windows, advance, staging.path_of, staging.start
        )
        return Staged(tensors, transfer)


def stage_all(rows: Iterable[Row], staging: Staging, group_of: Callable[[str], int]) -> tuple[Staged, ...]:
    """Begin to bring those rows to accelerators that staging can: one transfer for each accelerator.

    Args:
        rows: rows that are to be made; others are left to the caller.
        staging: how.
        group_of: as for `stage`.

    Raises:
        DeviceMemoryError: an accelerator has too little memory. All that was taken is free again.
    """
    return begin_all(prepare_all(rows, staging, group_of), staging)


def prepare_all(rows: Iterable[Row], staging: Staging, group_of: Callable[[str], int]) -> tuple[Prepared, ...]:
    """What `stage_all` would begin, for `begin_all`."""
    by_device = _by_device(rows, staging, {}).values()
    return tuple(_prepare(of_device, device, staging, group_of) for device, of_device in by_device)


def begin_all(prepared: Iterable[Prepared], staging: Staging) -> tuple[Staged, ...]:
    """Begin what was prepared: as `stage_all`, each time with memory of its own."""
    under_way: list[Staged] = []
    try:
        for one in prepared:
            under_way.append(_begin(one, staging, {}))  # noqa: PERF401 - what has begun ends if another fails
    except BaseException:
        for staged in under_way:
            staged.transfer.cancel()
        raise
    return tuple(under_way)


def has_staged_rows(plan: LoadPlan, staging: Staging) -> bool:
    """Whether rows of a plan are bound for an accelerator that staging reaches. OptionError if it is not there."""
    names = {row.device for row in plan.all_rows if row.action is Action.MOVE}
    return any(staging.devices(name) is not None for name in names)


def begin_pinning(names: Iterable[str], n_bytes: Callable[[], int], staging: Staging) -> None:
    """Pin host memory on a thread for a load to come, while its headers and its skeleton are made.

    Args:
        names: devices of the load.
        n_bytes: gives the size of the checkpoint; asked for only if a device is staged.
        staging: how it will be loaded.

    Raises:
        OptionError: a device is not there.
    """
    devices = {device.name: device for name in names if (device := staging.devices(name)) is not None}
    for device in devices.values():
        n_slots = min(staging.n_slots, -(-n_bytes() // staging.limits.chunk_bytes))
        pin_ahead(device, staging.limits.chunk_bytes, n_slots * len(devices))


def _by_device(
    rows: Iterable[Row], staging: Staging, existing: Mapping[str, torch.Tensor]
) -> dict[str, tuple[Device, list[Row]]]:
    """The rows that staging brings to accelerators, by the accelerator's name."""
    found: dict[str, tuple[Device, list[Row]]] = {}
    devices = cache(staging.devices)
    as_moved, as_slice = Action.MOVE, Action.SLICE  # looking them up for each of many rows shows
    for row in rows:
        if row.action is not as_moved and row.action is not as_slice and row.device:
            continue
        device = _device_of(row, devices, existing)
        if device is not None:
            found.setdefault(device.name, (device, []))[1].append(row)
    return found


def _device_of(row: Row, devices: Devices, existing: Mapping[str, torch.Tensor]) -> Device | None:
    """The device that staging brings a row to, which is to be moved or to fill memory; None where it does not."""
    if row.device:
        wanted = row.device
    else:
        tensor = existing[row.fqn]
        is_simple = tensor.is_contiguous() and type(tensor.data) is torch.Tensor
        wanted = str(tensor.device) if is_simple else ""
    device = devices(wanted) if wanted else None
    return device if device is not None and can_be_staged(row) else None


def _memory(
    plan: StagingPlan, device: Device, existing: Mapping[str, torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The buffers of a plan, and the scratch. What is not given is allocated at once, so that all or nothing is."""
    given: dict[int, Wanted] = {
        place.buffer: one for one, place in zip(plan.wanted, plan.places, strict=True) if one.is_given
    }
    sizes = [n_bytes for number, n_bytes in enumerate(plan.buffers) if number not in given]
    *made, scratch = device.allocate([*sizes, plan.scratch_bytes])
    fresh = iter(made)
    buffers = [
        _bytes_of(existing[given[number].names[0]]) if number in given else next(fresh)
        for number in range(len(plan.buffers))
    ]
    return buffers, scratch


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as a flat tensor of bytes."""
    n_bytes, begin = tensor.numel() * tensor.itemsize, tensor.storage_offset() * tensor.itemsize
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.detach().untyped_storage(), begin, (n_bytes,), (1,))


def _notes_of_unstaged(left: LoadPlan, staging: Staging) -> tuple[str, ...]:
    """What was bound for accelerators and has to be made in the machine's memory first."""
    devices = cache(staging.devices)
    rows = [row for row in left.all_rows if row.action is Action.MOVE and devices(row.device) is not None]
    if not rows:
        return ()
    n_bytes = sum(_n_file_bytes(row) for row in rows)
    what = f"{len(rows)} tensors ({format_bytes(n_bytes)})"
    return (f"{what} are made in memory first: encoded, strided, or of a type that no device converts",)


def _n_file_bytes(row: Row) -> int:
    return row.spec.n_bytes if isinstance(row, FusedRow) or row.spec.view is not None else row.spec.region.n_bytes
