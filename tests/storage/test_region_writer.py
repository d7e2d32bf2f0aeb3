"""Regions of a file that others write to as well."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastload.storage.writing import RegionWriter


def writer_of(path: Path, n_bytes: int, told: list[int] | None = None) -> RegionWriter:
    path.write_bytes(bytes(n_bytes))
    return RegionWriter(os.open(path, os.O_WRONLY), None if told is None else told.append)


def test_regions_go_to_their_places_and_the_rest_is_left_alone(tmp_path: Path) -> None:
    told: list[int] = []
    with writer_of(tmp_path / "file", 12, told) as writer:
        for offset, data in [(8, b"ef"), (0, b"ab"), (2, b"cd"), (10, b"g")]:
            writer.write_at(offset, memoryview(data))
        writer.flush()
    assert (tmp_path / "file").read_bytes() == b"abcd\0\0\0\0efg\0"
    assert told == [2, 4, 1]  # what follows in the file goes in one call


def test_more_regions_than_a_call_takes_are_all_written(tmp_path: Path) -> None:
    with writer_of(tmp_path / "file", 0) as writer:
        for offset in range(5000):
            writer.write_at(offset, memoryview(bytes([offset % 251])))
        writer.flush()
    assert (tmp_path / "file").read_bytes() == bytes(offset % 251 for offset in range(5000))


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    told: list[int] = []
    piece = memoryview(bytes(3 << 20))
    with writer_of(tmp_path / "file", 0, told) as writer:
        for number in range(6):
            writer.write_at(number * len(piece), piece)
        assert sum(told) == 18 << 20


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with RegionWriter(os.open(tmp_path / "file", os.O_RDONLY)) as writer:
        writer.write_at(0, memoryview(b"new"))
        with pytest.raises(OSError, match="Bad file descriptor"):
            writer.flush()
