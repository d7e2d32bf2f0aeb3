"""Transfers: their order, what they wait for, how they end. The device is memory, its streams are threads."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastload.checkpoint import Checkpoint
from fastload.errors import BlockError, TruncatedFileError, UnreadableFileError
from fastload.placement.device import Staging, stage
from fastload.storage.cpu_device import CpuDevice
from fastload.storage.crew import start_thread
from fastload.storage.memory import private_bytes
from fastload.storage.ring import free_pinned_memory, kept_pinned_bytes, pin_ahead
from tests.cold import threads, wait_for_no_threads
from tests.conftest import same_bytes
from tests.staging.conftest import LIMITS, rows_of
from tests.staging.devices import ActingDevice, CountingDevice, GatedDevice

StagingTo = Callable[..., Staging]


def group_of(name: str) -> int:
    """The number of a layer, and all others before the first."""
    return int(name.split(".")[1]) + 1 if name.startswith("layers.") else 0


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_arrives_is_what_is_in_the_file(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    staged = stage(rows_of(checkpoint), CountingDevice(), staging_to())
    staged.transfer.wait()
    assert all(same_bytes(staged.tensors[key], tensor) for key, tensor in checkpoint.items())


def test_a_group_can_be_waited_for_while_later_ones_are_under_way(
    checkpoint: Checkpoint, staging_to: StagingTo
) -> None:
    # The tensors of group 0 are as many parts: the next copy waits at the gate.
    rows = rows_of(checkpoint)
    first = [row for row in rows if not group_of(row.fqn)]
    probe = CountingDevice()
    alone = stage(first, probe, staging_to())
    alone.transfer.wait()
    device = GatedDevice(n_free=n_parts(alone.transfer))
    staged = stage(rows, device, staging_to(n_slots=20), group_of=group_of)
    with staged.transfer as transfer:
        transfer.wait(0)
        for row in first:
            assert same_bytes(staged.tensors[row.fqn], checkpoint[row.fqn])
        assert threads()
        device.gate.set()
        transfer.wait()
    assert same_bytes(staged.tensors["layers.39.weight"], checkpoint["layers.39.weight"])


def n_parts(transfer: object) -> int:
    chunks = transfer._chunks  # type: ignore[attr-defined]
    return sum(len(chunk.parts) for chunk in chunks)


def test_a_stream_can_be_held_back_for_a_group(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    staged = stage(rows_of(checkpoint), CountingDevice(), staging_to(), group_of=group_of)
    with staged.transfer as transfer:
        for group in range(41):
            transfer.hold_back(group)
            names = [name for name in staged.tensors if group_of(name) == group]
            assert all(same_bytes(staged.tensors[name], checkpoint[name]) for name in names)


def test_a_group_without_bytes_is_there_at_once(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    device = GatedDevice()
    with stage(rows_of(checkpoint), device, staging_to()).transfer as transfer:
        transfer.wait(99)
        transfer.hold_back(99)
        device.gate.set()


def test_readers_wait_for_copies_and_take_no_more_than_the_ring(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    device = GatedDevice()
    with stage(rows_of(checkpoint), device, staging_to(n_slots=3)).transfer as transfer:
        sent: set[bool] = set()
        while len(transfer._ring._held) < 3:
            sent.add(transfer._ended)
        device.gate.set()
        transfer.wait()
    assert sent <= {False}
    assert device.n_pins == 3


def test_the_ring_is_kept_for_the_next_transfer_and_given_back_on_request(
    checkpoint: Checkpoint, staging_to: StagingTo
) -> None:
    device = CountingDevice()
    for _ in range(3):
        stage(rows_of(checkpoint), device, staging_to()).transfer.wait()
    assert device.n_pins <= 4
    assert kept_pinned_bytes() == device.n_pins * LIMITS.chunk_bytes
    assert free_pinned_memory() == device.n_pins * LIMITS.chunk_bytes
    assert kept_pinned_bytes() == 0
    n_pins = device.n_pins
    stage(rows_of(checkpoint), device, staging_to()).transfer.wait()
    assert device.n_pins > n_pins


def test_what_is_pinned_ahead_is_part_of_the_ring(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    device = CountingDevice()
    pin_ahead(device, LIMITS.chunk_bytes, 4)
    pin_ahead(device, LIMITS.chunk_bytes, 4)
    stage(rows_of(checkpoint), device, staging_to()).transfer.wait()
    wait_for_no_threads()
    assert device.n_pins == 4


def test_memory_that_cannot_be_pinned_ahead_is_told_by_the_transfer(
    checkpoint: Checkpoint, staging_to: StagingTo
) -> None:
    class WithoutPins(CountingDevice):
        def pin(self, n_bytes: int) -> None:  # type: ignore[override]
            raise MemoryError("nothing to pin")

    device = WithoutPins()
    pin_ahead(device, LIMITS.chunk_bytes, 4)
    with pytest.raises(MemoryError, match="nothing to pin"):
        stage(rows_of(checkpoint), device, staging_to()).transfer.wait()


def test_a_file_cut_while_it_is_read_is_named(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    path = checkpoint.files[0]
    before = open_descriptors()
    device = ActingDevice(3, lambda: os.truncate(path, 100_000))
    with pytest.raises(TruncatedFileError, match=r"model\.safetensors"):
        stage(rows_of(checkpoint), device, staging_to(n_slots=2)).transfer.wait()
    assert threads() == []
    assert open_descriptors() == before
    assert kept_pinned_bytes() == device.n_pins * LIMITS.chunk_bytes


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_file_that_cannot_be_read_is_named(checkpoint: Checkpoint, staging_to: StagingTo, is_folder: bool) -> None:
    path = Path(checkpoint.files[0])
    path.unlink()
    if is_folder:
        path.mkdir()
    with pytest.raises(UnreadableFileError, match=r"model\.safetensors"):
        stage(rows_of(checkpoint), CountingDevice(), staging_to()).transfer.wait()
    assert threads() == []


def test_a_copy_that_fails_ends_the_transfer(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    def fail() -> None:
        raise RuntimeError("the link is down")

    with pytest.raises(RuntimeError, match="the link is down"):
        stage(rows_of(checkpoint), ActingDevice(2, fail), staging_to()).transfer.wait()
    assert threads() == []


def test_who_waits_for_a_group_is_told_what_went_wrong(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    os.truncate(checkpoint.files[0], 20_000)
    with stage(rows_of(checkpoint), CountingDevice(), staging_to(), group_of=group_of).transfer as transfer:
        with pytest.raises(TruncatedFileError):
            transfer.wait(40)
        with pytest.raises(TruncatedFileError):
            transfer.hold_back(40)


def test_a_cancelled_transfer_waits_for_the_copies_that_are_under_way(
    checkpoint: Checkpoint, staging_to: StagingTo
) -> None:
    device = GatedDevice(n_free=1)
    transfer = stage(rows_of(checkpoint), device, staging_to(n_slots=2)).transfer
    device.is_held.wait()
    cancelling = threading.Thread(target=transfer.cancel, name="cancelling")
    cancelling.start()
    assert not transfer._ended
    device.gate.set()
    cancelling.join()
    with pytest.raises(BlockError, match="cancelled"):
        transfer.wait()
    assert threads() == []
    transfer.cancel()  # nothing more happens


def test_a_transfer_that_is_cancelled_by_its_own_thread_ends(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    # As garbage is collected on whatever thread allocates: the model goes, and with it what it waits for.
    is_there = threading.Event()
    device = ActingDevice(2, lambda: is_there.wait() and staged.transfer.cancel())  # type: ignore[func-returns-value]
    staged = stage(rows_of(checkpoint), device, staging_to(n_slots=2))
    is_there.set()
    with pytest.raises(BlockError, match="cancelled"):
        staged.transfer.wait()
    assert threads() == []


def load_until_interrupted(checkpoint: Checkpoint, device: ActingDevice, staging: Staging) -> None:
    with stage(rows_of(checkpoint), device, staging).transfer as transfer:
        while True:  # however short the transfer is, the signal comes while it is waited for
            transfer.wait()


def test_ctrl_c_ends_the_transfer_and_the_next_one_is_as_any(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    device = ActingDevice(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = open_descriptors()
    with pytest.raises(KeyboardInterrupt):
        load_until_interrupted(checkpoint, device, staging_to())
    wait_for_no_threads()  # the signal may have come before there was anything to be waited for
    assert open_descriptors() == before
    staged = stage(rows_of(checkpoint), device, staging_to())
    device.number = -1
    staged.transfer.wait()
    assert same_bytes(staged.tensors["large"], checkpoint["large"])


def test_ctrl_c_while_the_first_thread_begins_leaves_nothing(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    def interrupted(begin: bool) -> Any:
        def start(do: Callable[[], None], name: str) -> Any:
            if begin:
                start_thread(do, name)
            raise KeyboardInterrupt

        return start

    device = CountingDevice()
    for begin in (True, False):
        with pytest.raises(KeyboardInterrupt):
            stage(rows_of(checkpoint), device, staging_to()._replace(start=interrupted(begin)))
        wait_for_no_threads()
    assert kept_pinned_bytes() == device.n_pins * LIMITS.chunk_bytes


def test_fifty_transfers_leave_nothing_behind(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    device, rows = CountingDevice(), rows_of(checkpoint)

    def load() -> None:
        stage(rows, device, staging_to()).transfer.wait()

    for _ in range(5):
        load()
    gc.collect()  # what earlier tests have left
    before, descriptors, n_pins = private_bytes(), open_descriptors(), device.n_pins
    for _ in range(50):
        load()
    after = private_bytes()
    assert before is not None
    assert after is not None
    assert after - before < 8 << 20  # one load is 3 MB
    assert (open_descriptors(), device.n_pins, threads()) == (descriptors, n_pins, [])


def test_tensors_that_arrive_in_inference_mode_can_be_trained(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    with torch.inference_mode():
        staged = stage(rows_of(checkpoint), CountingDevice(), staging_to())
        staged.transfer.wait()
    weight = staged.tensors["large"].requires_grad_()
    (weight * 2).sum().backward()
    assert weight.grad is not None


def test_large_tensors_have_a_storage_of_exactly_their_size(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    staged = stage(rows_of(checkpoint), CpuDevice("cuda:0"), staging_to())
    staged.transfer.wait()
    assert staged.tensors["large"].untyped_storage().nbytes() == checkpoint["large"].nbytes
