from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastload.errors import SaveError
from fastload.storage import atomic
from fastload.storage.atomic import create_temporary, write_bytes, write_text


def test_bytes_and_text_arrive_unchanged(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"\0\r\n\xff")
    write_text(tmp_path / "b", "é\r\n")
    assert (tmp_path / "a").read_bytes() == b"\0\r\n\xff"
    assert (tmp_path / "b").read_bytes() == b"\xc3\xa9\r\n"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_file_without_folder_is_written_to_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text("plain.json", "{}")
    assert (tmp_path / "plain.json").read_text() == "{}"


@pytest.mark.parametrize(("mask", "mode"), [("022", 0o644), ("002", 0o664), ("077", 0o600)])
def test_mode_is_the_umasks(tmp_path: Path, mask: str, mode: int) -> None:
    # In a process of its own: the umask is one for all threads, and other tests may run beside this one.
    program = f"import os; os.umask(0o{mask}); from fastload.storage.atomic import write_text; write_text('f', '')"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "f").stat().st_mode & 0o777 == mode


def test_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "f"
    versions = [bytes([i]) * 200_000 for i in range(2)]
    write_bytes(path, versions[0])
    done = threading.Event()

    def keep_writing() -> None:
        for i in range(100):
            write_bytes(path, versions[i % 2], sync=False)
        done.set()

    writer = threading.Thread(target=keep_writing)
    writer.start()
    while not done.is_set():
        assert path.read_bytes() in versions
    writer.join()


def test_symbolic_link_is_replaced_and_its_target_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("old")
    (tmp_path / "link").symlink_to("blob")
    write_text(tmp_path / "link", "new")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "blob").read_text() == "old"


def test_full_disk_keeps_the_old_file_and_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("old")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", no_space)
    with pytest.raises(SaveError, match=r"f could not be written: No space left(.|\n)*free space"):
        write_text(tmp_path / "f", "new")
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_text() == "old"


def test_interrupt_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "f", "new")
    assert os.listdir(tmp_path) == []


def test_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="create the folder first") as caught:
        write_text(tmp_path / "no" / "f", "x")
    assert caught.value.file == str(tmp_path / "no" / "f")


def test_folder_of_the_files_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(SaveError, match="a folder has the file's name"):
        write_text(tmp_path / "f", "x")
    assert os.listdir(tmp_path) == ["f"]


def test_temporary_is_hidden_new_and_tells_its_process(tmp_path: Path) -> None:
    made = [create_temporary(tmp_path) for _ in range(3)]
    names = {os.path.basename(path) for _, path in made}
    for descriptor, _ in made:
        os.close(descriptor)
    assert len(names) == 3
    assert all(name.startswith(".") and f"-{os.getpid()}-" in name for name in names)
