"""Files that lie in memory are sent from where they lie, if that is faster, or costs nothing the next time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fastload.checkpoint import Checkpoint, open_checkpoint
from fastload.errors import DeviceMemoryError, TruncatedFileError
from fastload.formats.chunks import Chunk, Read
from fastload.placement.device import Staging, stage
from fastload.storage.ring import free_pinned_memory, kept_pinned_bytes
from fastload.storage.windows import Windows
from tests.cold import threads
from tests.conftest import same_bytes
from tests.staging.conftest import LIMITS, mixed_tensors, rows_of
from tests.staging.devices import ActingDevice, CountingDevice, GatedDevice

PAGE = 4096
StagingTo = Callable[..., Staging]
# Slots for all of the checkpoint, twice: what is registered stays so.
PLENTY = 160


class RegisteringDevice(CountingDevice):
    """Knows what is registered with it."""

    def __init__(self) -> None:
        super().__init__()
        self.registered: dict[int, int] = {}
        self.n_registrations = 0
        self.most_bytes = 0

    def register(self, address: int, n_bytes: int) -> None:
        with self._lock:
            self.registered[address] = n_bytes
            self.n_registrations += 1
            self.most_bytes = max(self.most_bytes, sum(self.registered.values()))

    def unregister(self, address: int) -> None:
        with self._lock:
            del self.registered[address]


@pytest.fixture(autouse=True)
def _in_memory(lie_in_memory: Callable[[bool], None]) -> None:
    lie_in_memory(True)


def transfer(checkpoint: Checkpoint, device: CountingDevice, staging: Staging) -> str:
    """Send everything, compare it, and say how it was done."""
    staged = stage(rows_of(checkpoint), device, staging)
    staged.transfer.wait()
    assert all(same_bytes(staged.tensors[key], tensor) for key, tensor in checkpoint.items())
    assert threads() == []
    return staged.transfer.note


def test_both_ways_are_tried_within_what_may_be_pinned(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    device = RegisteringDevice()
    note = transfer(checkpoint, device, staging_to(n_slots=8))
    assert device.n_registrations > 0
    assert device.n_pins <= 4
    assert device.most_bytes <= 4 * LIMITS.chunk_bytes
    assert device.registered == {}
    assert "a reader registered" in note


@pytest.mark.parametrize(("registered_s", "is_registered"), [(0.1, True), (0.3, False)])
def test_the_faster_of_both_ways_is_taken_after_a_trial_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered_s: float, is_registered: bool
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(64 * PAGE))
    chunks = [Chunk(str(file), 0, (Read(PAGE * number, PAGE, 0),), ()) for number in range(64)]
    device, now = RegisteringDevice(), [0.0]
    monkeypatch.setattr("fastload.storage.windows.perf_counter", lambda: now[0])

    def register(address: int, n_bytes: int) -> None:
        now[0] += registered_s

    monkeypatch.setattr(device, "register", register)
    monkeypatch.setattr(device, "unregister", lambda address: None)
    windows = Windows(device, chunks, 8 * PAGE)
    stream, ways = device.open_stream(), []
    for chunk in chunks:
        window = windows.open(chunk)
        ways.append(window is not None)
        if window is None:
            windows.tell_read(str(file), PAGE, 0.2)
        else:
            windows.give_back(window, stream.record())
            stream.record().wait()
    stream.close()
    windows.close()
    assert ways[:12] == [True, False] * 6
    assert set(ways[14:]) == {is_registered}
    assert ("pages registered" if is_registered else "; read, which is faster") in str(windows)


def test_what_is_registered_is_kept_for_the_next_load_and_given_back_on_request(
    checkpoint: Checkpoint, staging_to: StagingTo
) -> None:
    device = RegisteringDevice()
    for _ in range(3):
        note = transfer(checkpoint, device, staging_to(n_slots=PLENTY))
        assert "stay so for the next load" in note
    assert device.n_registrations == len(device.registered) > 0
    assert device.n_pins == 0
    kept_bytes = sum(device.registered.values())
    assert kept_pinned_bytes() == kept_bytes
    assert free_pinned_memory() == kept_bytes
    assert device.registered == {}


def test_what_is_kept_of_many_files_is_no_more_than_what_may_be_pinned(tmp_path: Path, staging_to: StagingTo) -> None:
    device = RegisteringDevice()
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        save_file(mixed_tensors(), tmp_path / str(number) / "model.safetensors")
        transfer(open_checkpoint(tmp_path / str(number)), device, staging_to(n_slots=PLENTY))
    assert sum(device.registered.values()) <= PLENTY // 2 * LIMITS.chunk_bytes


def test_a_file_that_was_written_anew_is_registered_anew(tmp_path: Path, staging_to: StagingTo) -> None:
    device = RegisteringDevice()
    for offset in (0, 1):
        save_file({key: tensor + offset for key, tensor in mixed_tensors().items() if key != "mask"}, tmp_path / "next")
        os.replace(tmp_path / "next", tmp_path / "model.safetensors")
        transfer(open_checkpoint(tmp_path), device, staging_to(n_slots=PLENTY))


def test_where_the_driver_refuses_files_are_read(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    class Refusing(CountingDevice):
        def register(self, address: int, n_bytes: int) -> None:
            raise DeviceMemoryError("no", found="CUDA error 801")

    note = transfer(checkpoint, Refusing(), staging_to(n_slots=PLENTY))
    assert "cannot be registered (CUDA error 801)" in note


def test_files_elsewhere_are_not_registered(
    checkpoint: Checkpoint, staging_to: StagingTo, lie_in_memory: Callable[[bool], None]
) -> None:
    lie_in_memory(False)
    device = RegisteringDevice()
    assert transfer(checkpoint, device, staging_to(n_slots=PLENTY)).endswith("from the page cache")
    assert device.n_registrations == 0


def test_a_file_that_was_cut_is_told(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    device = RegisteringDevice()
    os.truncate(checkpoint.files[0], 100_000)
    with pytest.raises(TruncatedFileError, match=r"model\.safetensors"):
        stage(rows_of(checkpoint), device, staging_to(n_slots=PLENTY)).transfer.wait()
    free_pinned_memory()
    assert device.registered == {}


def test_a_transfer_that_ends_early_leaves_nothing_registered(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    class Gated(GatedDevice, RegisteringDevice):
        pass

    device = Gated(n_free=1)
    sending = stage(rows_of(checkpoint), device, staging_to(n_slots=16)).transfer
    device.is_held.wait()
    cancelling = threading.Thread(target=sending.cancel)
    cancelling.start()
    device.gate.set()
    cancelling.join()
    assert device.n_registrations > 0
    assert device.registered == {}
    assert threads() == []


def test_a_copy_that_fails_leaves_nothing_registered(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    class Acting(ActingDevice, RegisteringDevice):
        pass

    def fail() -> None:
        raise RuntimeError("the link is down")

    device = Acting(2, fail)
    with pytest.raises(RuntimeError, match="the link is down"):
        stage(rows_of(checkpoint), device, staging_to(n_slots=16)).transfer.wait()
    assert device.registered == {}
