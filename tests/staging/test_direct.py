"""Chunks read through the page cache and past it are the same bytes, and the faster way is found by trying."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastload.checkpoint import Checkpoint
from fastload.errors import TruncatedFileError
from fastload.formats.chunks import Chunk, Read
from fastload.placement.device import Staging, stage
from fastload.storage.devices import PinnedMemory
from fastload.storage.direct import Choice, ChunkFiles
from tests.cold import make_cold
from tests.conftest import same_bytes
from tests.staging.conftest import rows_of
from tests.staging.devices import CountingDevice

PAGE = 4096


class AlwaysPast(Choice):
    """Chooses to read past the page cache."""

    refused = ""

    def is_direct(self, file: str) -> bool:
        return not self.refused

    def refuse(self, reason: str) -> None:
        self.refused = reason


@pytest.fixture
def past(tmp_path: Path) -> AlwaysPast:
    """The choice to read past the page cache; skips the test where the file system does not allow it."""
    (tmp_path / "probe").write_bytes(bytes(PAGE))
    try:
        os.close(os.open(tmp_path / "probe", os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error.strerror}")
    return AlwaysPast(())


def cold_file(file: Path) -> None:
    """A file of 16 MB that is not cached; to look for what is cached of a small one brings the rest in."""
    file.write_bytes(os.urandom(1 << 20) * 16)
    make_cold(file)


def chunk_of(file: Path, *ranges: tuple[int, int]) -> Chunk:
    """A chunk that reads ranges of a file, each on a page of its own."""
    reads, at = [], 0
    for offset, n_bytes in ranges:
        reads.append(Read(offset, n_bytes, at + offset % PAGE))
        at = -(-(at + offset % PAGE + n_bytes) // PAGE) * PAGE
    return Chunk(str(file), 0, tuple(reads), ())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edges=st.lists(st.integers(0, 50_000), min_size=2, max_size=6, unique=True))
def test_any_ranges_read_past_the_page_cache(tmp_path: Path, past: AlwaysPast, edges: list[int]) -> None:
    contents = os.urandom(50_000)  # no multiple of a page
    (tmp_path / "file").write_bytes(contents)
    edges.sort()
    chunk = chunk_of(tmp_path / "file", *((a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=False)))
    slot = PinnedMemory(32 * PAGE)
    for choice in (past, Choice([str(tmp_path / "file")])):
        slot.bytes[:] = bytes(32 * PAGE)
        with ChunkFiles(choice) as files:
            assert files.read(chunk, slot.bytes, threading.Event())
        for read in chunk.reads:
            found = slot.bytes[read.at_bytes : read.at_bytes + read.n_bytes]
            assert found == contents[read.offset_bytes : read.offset_bytes + read.n_bytes]
    assert not past.refused


def test_a_file_that_ends_early_is_told_past_the_page_cache_too(tmp_path: Path, past: AlwaysPast) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * PAGE + 5))
    chunk = chunk_of(tmp_path / "file", (PAGE, 3 * PAGE))
    with ChunkFiles(past) as files, pytest.raises(TruncatedFileError, match=str(4 * PAGE)):
        files.read(chunk, PinnedMemory(8 * PAGE).bytes, threading.Event())


def test_a_read_that_was_stopped_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(PAGE))
    stop = threading.Event()
    stop.set()
    with ChunkFiles(Choice(())) as files:
        assert not files.read(chunk_of(tmp_path / "file", (0, PAGE)), PinnedMemory(PAGE).bytes, stop)


def test_what_is_cached_is_read_from_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(PAGE))
    choice = Choice([str(tmp_path / "file")])
    assert not choice.is_cold
    assert not choice.is_direct(str(tmp_path / "file"))
    assert str(choice) == "from the page cache"


@pytest.mark.parametrize(("past_s", "is_past"), [(0.1, True), (0.3, False)])
def test_the_faster_of_both_ways_is_taken_after_a_trial_of_both(tmp_path: Path, past_s: float, is_past: bool) -> None:
    file = tmp_path / "file"
    cold_file(file)
    choice = Choice([str(file)])
    ways = [choice.is_direct(str(file)) for _ in range(12)]
    assert ways == [True, False] * 6
    for way in ways:
        choice.tell(way, 1_000_000, past_s if way else 0.2)
    assert {choice.is_direct(str(file)) for _ in range(4)} == {is_past}
    assert str(choice).startswith("past the page cache" if is_past else "through the page cache")
    assert f"{1 / past_s:.1f} MB/s a reader past it, 5.0 MB/s through it" in str(choice)


def test_a_file_system_without_such_reads_is_read_through_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    cold_file(file)
    choice = Choice([str(file)])
    choice.refuse("Invalid argument")
    assert not any(choice.is_direct(str(file)) for _ in range(4))
    assert "O_DIRECT is refused (Invalid argument)" in str(choice)


def test_cold_files_arrive_as_they_are(checkpoint: Checkpoint, staging_to: Callable[..., Staging]) -> None:
    (file,) = checkpoint.files
    modified_ns = os.stat(file).st_mtime_ns
    os.truncate(file, 32 << 20)
    os.utime(file, ns=(modified_ns, modified_ns))  # otherwise it would be taken for another file
    make_cold(file)
    staged = stage(rows_of(checkpoint), CountingDevice(), staging_to())
    staged.transfer.wait()
    assert all(same_bytes(staged.tensors[key], tensor) for key, tensor in checkpoint.items())
    assert "reader past it" in staged.transfer.note
