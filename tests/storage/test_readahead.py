"""Threads that bring files into the page cache."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastload.storage import readahead as readahead_module
from fastload.storage.readahead import LOCAL, NETWORK, Extent, Readahead, Way, choose_way, within_memory
from fastload.storage.residency import FileSystem
from tests.cold import make_cold, read_bytes, resident, threads, wait_for_no_threads

MB = 1 << 20
SIZE = 32 * MB
WAYS = [Way(4, 4 * MB, MB), Way(4, MB, 4 * MB)]


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(MB) * 32)
    make_cold(file)
    return str(file)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_cold_file_becomes_warm(path: str, way: Way) -> None:
    reading = Readahead([Extent(path, 0, SIZE)], way)
    assert reading.wait(20)
    assert reading.is_done
    assert resident(path) == SIZE
    assert reading.n_brought_bytes > 0
    wait_for_no_threads()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_only_what_was_asked_for_is_read(path: str, way: Way) -> None:
    assert Readahead([Extent(path, 8 * MB, 8 * MB)], way).wait(20)
    # The kernel's own readahead may go beyond, but not to the whole file and back.
    assert 8 * MB <= resident(path) < SIZE


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_cached_is_not_read_again(path: str, way: Way) -> None:
    assert Readahead([Extent(path, 0, SIZE)], way).wait(20)
    before = read_bytes()
    again = Readahead([Extent(path, 0, SIZE)], way)
    assert again.wait(20)
    assert again.n_brought_bytes == 0
    assert read_bytes() == before


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_of_a_file_that_lost_a_few_pages_only_these_are_read(path: str, way: Way) -> None:
    Path(path).read_bytes()
    descriptor = os.open(path, os.O_RDONLY)
    for at in (5 * MB, 20 * MB):
        os.posix_fadvise(descriptor, at, 64 << 10, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    assert resident(path) < SIZE
    reading = Readahead([Extent(path, 0, SIZE)], way)
    assert reading.wait(20)
    assert resident(path) == SIZE
    assert 0 < reading.n_brought_bytes <= 2 * way.read_bytes


def test_a_file_is_fetched_from_storage_once(path: str) -> None:
    before = read_bytes()
    assert Readahead([Extent(path, 0, SIZE), Extent(path, 0, SIZE)], WAYS[0]).wait(20)
    with open(path, "rb") as file:
        file.read()
    assert read_bytes() - before <= SIZE + MB


def test_extents_are_read_in_the_order_given(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        readahead_module, "resident_bytes", lambda _, offset_bytes, n_bytes: seen.append(offset_bytes // MB)
    )
    one_by_one = Way(1, MB, MB)
    reading = Readahead([Extent(path, 16 * MB, 4 * MB), Extent(path, 0, 4 * MB)], one_by_one)
    reading.wait(20)
    assert list(dict.fromkeys(seen)) == [16, 17, 18, 19, 0, 1, 2, 3]


def test_stopping_is_prompt_and_ends_the_threads(path: str) -> None:
    reading = Readahead([Extent(path, 0, SIZE)] * 1000, Way(2, 4096, 4096))
    begin = time.monotonic()
    reading.stop()
    assert time.monotonic() - begin < 0.1
    assert reading.wait(5)
    wait_for_no_threads()


def test_the_threads_end_when_the_object_is_collected(path: str) -> None:
    reading = Readahead([Extent(path, 0, SIZE)] * 1000, Way(2, 4096, 4096))
    del reading
    gc.collect()
    wait_for_no_threads(5)


def test_waiting_can_time_out(path: str) -> None:
    reading = Readahead([Extent(path, 0, SIZE)] * 1000, Way(1, 4096, 4096))
    assert reading.wait(0.001) is False
    reading.stop()
    assert reading.wait(5)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_files_that_are_lost_or_cut_are_left_out(path: str, tmp_path: Path, way: Way) -> None:
    extents = [Extent(str(tmp_path / "none"), 0, MB), Extent(path, SIZE - MB, 100 * MB), Extent(path, 0, MB)]
    assert Readahead(extents, way).wait(20)
    assert resident(path) >= 2 * MB


def test_nothing_to_read_is_done_at_once() -> None:
    reading = Readahead([])
    assert reading.is_done
    assert reading.wait(0)


def test_a_child_that_was_forked_does_not_wait(path: str) -> None:
    reading = Readahead([Extent(path, 0, SIZE)] * 1000, Way(1, 4096, 4096))
    pid = os.fork()
    if pid == 0:  # the child: no assertion may get out of here
        os._exit(0 if reading.is_done and reading.wait() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    reading.stop()
    wait_for_no_threads()


def test_the_process_ends_while_something_is_read(path: str) -> None:
    script = (
        "from fastload.storage.readahead import *\n"
        f"r = Readahead([Extent({path!r}, 0, {SIZE})] * 100000, Way(4, 4096, 4096))\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - begin < 5


def test_no_more_is_read_than_free_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    extents = [Extent("a", 0, 100), Extent("b", 50, 100), Extent("c", 0, 100)]
    assert within_memory(extents, 150) == (Extent("a", 0, 100), Extent("b", 50, 50))
    monkeypatch.setattr(readahead_module, "available_bytes", lambda: readahead_module._RESERVE_BYTES + 120)
    assert within_memory(extents) == (Extent("a", 0, 100), Extent("b", 50, 20))
    monkeypatch.setattr(readahead_module, "available_bytes", lambda: 0)
    assert within_memory(extents) == ()
    monkeypatch.setattr(readahead_module, "available_bytes", lambda: None)
    assert within_memory(extents) == tuple(extents)


def test_networks_are_asked_for_more_at_a_time() -> None:
    assert choose_way(FileSystem("nfs", True)) is NETWORK
    assert choose_way(FileSystem("ext4", False)) is LOCAL
    assert NETWORK.read_bytes > LOCAL.read_bytes


def test_no_thread_to_be_had_is_no_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    reading = Readahead([Extent(path, 0, SIZE)], WAYS[0])
    assert reading.wait(1)
    assert threads() == []
