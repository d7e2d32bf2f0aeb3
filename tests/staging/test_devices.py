"""Devices that are there, and those that are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastload
from fastload.errors import DeviceMemoryError, OptionError
from fastload.storage.cpu_device import CpuDevice
from fastload.storage.devices import PinnedMemory, device_for
from tests.staging.conftest import mixed_tensors

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("name", ["cpu", "meta", "mps"])
def test_what_is_no_cuda_device_is_not_reached_by_staging(name: str) -> None:
    assert device_for(name) is None


def test_a_kind_of_device_that_there_is_not_is_refused(tmp_path: Path) -> None:
    fastload.save_state_dict(mixed_tensors(), tmp_path)
    with pytest.raises(OptionError, match="unknown device"):
        fastload.load_state_dict(tmp_path, device="warp")


@without_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:99"])
def test_a_load_to_cuda_without_cuda_says_so(tmp_path: Path, name: str) -> None:
    fastload.save_state_dict(mixed_tensors(), tmp_path)
    with pytest.raises(OptionError, match="no CUDA device"):
        fastload.load_state_dict(tmp_path, device=name)
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(OptionError, match="no CUDA device"):
        fastload.load_model(module, tmp_path, device=name)
    assert module.weight.is_meta


@pytest.mark.parametrize("pinned_memory", ["much", -1])
def test_a_size_of_pinned_memory_that_cannot_be_meant_is_refused(tmp_path: Path, pinned_memory: str | int) -> None:
    fastload.save_state_dict(mixed_tensors(), tmp_path)
    with pytest.raises(OptionError, match="pinned_memory"):
        fastload.load_state_dict(tmp_path, pinned_memory=pinned_memory)


def test_copies_of_a_stream_are_done_in_order() -> None:
    stream = CpuDevice().open_stream()
    tensor = torch.zeros(1000)
    for value in range(50):
        stream.copy(tensor, torch.full((1000,), value))
    event = stream.record()
    event.wait()
    assert event.is_done()
    assert tensor.eq(49).all()
    stream.close()


def test_an_error_of_a_stream_is_raised_by_its_events_and_nothing_is_copied_after_it() -> None:
    stream = CpuDevice().open_stream()
    tensor = torch.zeros(4)
    stream.copy(tensor, torch.zeros(5))
    stream.copy(tensor, torch.ones(4))
    with pytest.raises(RuntimeError, match="size"):
        stream.record().wait()
    stream.close()
    assert tensor.eq(0).all()


def test_memory_of_a_device_is_given_whole_or_not_at_all() -> None:
    device = CpuDevice("small", capacity_bytes=100)
    assert [made.nbytes for made in device.allocate([60, 40, 0])] == [60, 40, 0]
    with pytest.raises(DeviceMemoryError, match="small"):
        device.allocate([60, 41])


def test_pinned_memory_begins_on_a_page_and_is_unregistered_once() -> None:
    addresses: list[int] = []
    memory = PinnedMemory(8192, addresses.append)
    address = memory.address
    memory.bytes[:3] = b"abc"
    assert address % 4096 == 0
    assert memory.tensor[:3].tolist() == [97, 98, 99]
    memory.release()
    assert addresses == [address]
    assert memory.n_bytes == 0


def test_a_forked_child_has_none_of_the_pinned_memory_of_its_parent() -> None:
    script = """
import os
from fastload.storage import ring
from fastload.storage.cpu_device import CpuDevice
device = CpuDevice()
ring._pool.put(device, device.pin(8192))
child = os.fork()
if not child:
    os._exit(0 if ring.kept_pinned_bytes() == 0 and ring.free_pinned_memory() == 0 else 1)
assert os.waitpid(child, 0)[1] == 0
assert ring.free_pinned_memory() == 8192
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=os.environ)


def test_freeing_pinned_memory_where_there_is_none() -> None:
    assert fastload.free_pinned_memory() == 0
