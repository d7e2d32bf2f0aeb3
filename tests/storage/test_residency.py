"""What is cached of a file, and what it lies on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastload.storage import memory
from fastload.storage import residency as residency_module
from fastload.storage.memory import available_bytes
from fastload.storage.residency import file_system, residency, resident_bytes
from tests.cold import make_cold, resident

SIZE = 8 << 20


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 20) * 8)
    opened = os.open(path, os.O_RDONLY)
    yield opened
    os.close(opened)


def path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def test_a_file_that_was_just_written_is_warm(descriptor: int) -> None:
    assert resident(path_of(descriptor)) == SIZE
    state = residency(descriptor)
    assert (state.is_warm, state.n_cold_bytes) == (True, 0)


def test_a_file_whose_pages_were_dropped_is_cold(descriptor: int) -> None:
    make_cold(path_of(descriptor))
    assert resident_bytes(descriptor, 0, SIZE) == 0
    state = residency(descriptor)
    assert not state.is_warm
    assert state.n_cold_bytes > SIZE // 2
    assert state.is_exact


def test_what_was_read_is_counted_and_nothing_else(descriptor: int) -> None:
    make_cold(path_of(descriptor))
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(descriptor, 1 << 20, 2 << 20)
    assert resident_bytes(descriptor, 2 << 20, 1 << 20) == 1 << 20
    assert resident_bytes(descriptor, 4 << 20, 1 << 20) == 0


def test_a_range_that_is_no_whole_pages_is_no_larger_than_itself(descriptor: int) -> None:
    resident(path_of(descriptor))
    assert resident_bytes(descriptor, 5000, 10) == 10
    assert resident_bytes(descriptor, 5000, 0) == 0
    assert residency(descriptor, SIZE - 100, 5000).n_bytes == 100
    assert residency(descriptor, SIZE + 100).is_warm


@pytest.mark.parametrize("missing", ["preadv", "preadv and mincore"])
def test_without_non_blocking_reads_mincore_tells_and_without_that_cachestat(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    make_cold(path_of(descriptor))
    monkeypatch.setattr(residency_module, "_n_readable_now", lambda *_: None)
    if "mincore" in missing:
        monkeypatch.setattr(residency_module, "_n_in_core", lambda *_: None)
    assert not residency(descriptor).is_warm
    os.pread(descriptor, SIZE, 0)
    state = residency(descriptor)
    assert state.is_warm
    assert state.is_exact == ("mincore" in missing)


def test_without_any_of_them_nothing_is_known_and_all_may_be_cold(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency_module, "_sampled_share", lambda *_: None)
    monkeypatch.setattr(residency_module, "resident_bytes", lambda *_: None)
    state = residency(descriptor)
    assert (state.n_resident_bytes, state.n_cold_bytes, state.is_warm) == (None, SIZE, False)


def test_on_overlayfs_cachestat_is_not_believed(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency_module, "file_system", lambda _: residency_module.FileSystem("overlayfs", False))
    monkeypatch.setattr(residency_module, "_n_readable_now", lambda *_: None)
    monkeypatch.setattr(residency_module, "resident_bytes", lambda *_: 0)
    assert residency(descriptor).is_warm


def test_a_descriptor_that_is_closed_tells_nothing(descriptor: int) -> None:
    copy = os.dup(descriptor)
    os.close(copy)
    assert resident_bytes(copy, 0, SIZE) is None


def test_file_systems_have_names(tmp_path: Path) -> None:
    assert not file_system(str(tmp_path)).is_network
    if os.path.isdir("/dev/shm"):
        assert file_system("/dev/shm").is_memory
    assert file_system("/no/such/file").name == "unknown"


@pytest.mark.parametrize(
    ("number", "name", "is_network"),
    [(0x6969, "nfs", True), (0xFF534D42, "cifs", True), (0x65735546, "fuse", True), (0x0BD00BD0, "lustre", True),
     (0x47504653, "gpfs", True), (0x00C36400, "ceph", True), (0x01021997, "9p", True), (0xEF53, "ext4", False),
     (0x12345678, "0x12345678", False)],
)  # fmt: skip
def test_the_type_of_a_file_system_says_whether_a_network_lies_before_it(
    number: int, name: str, is_network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Libc:
        @staticmethod
        def statfs(path: bytes, buffer: object) -> int:
            buffer._obj[0] = number  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(residency_module, "_libc", lambda: Libc)
    assert file_system("/mnt") == (name, is_network)


def test_memory_that_is_available_is_what_machine_and_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = available_bytes()
    assert whole is not None
    assert whole > 1 << 20
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("1000000\n")
    (tmp_path / "a" / "memory.current").write_text("600000\n")
    (tmp_path / "a" / "memory.stat").write_text("anon 500000\ninactive_file 50000\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1\n")
    monkeypatch.setattr(memory, "_V2_MOUNTS", (str(tmp_path),))
    real_open = open
    groups = tmp_path / "groups"
    groups.write_text("0::/a/b/../c\n")
    monkeypatch.setattr(
        memory,
        "open",
        lambda path, *rest: real_open(groups if path == "/proc/self/cgroup" else path, *rest),
        raising=False,
    )
    assert available_bytes() == 450000
    (tmp_path / "a" / "memory.max").write_text("500000\n")
    assert available_bytes() == 0
