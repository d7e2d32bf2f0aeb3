"""Every hostile file is refused: with an error that names a file, in less than a second, in little memory, unharmed.

The files are made by the modules beside this one. The counts are printed; README has them.
"""

from __future__ import annotations

import os
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastload.errors import ArchiveError, FastloadError
from fastload.formats.torch_bin import read_bin
from fastload.loader import load_state_dict
from tests.hostile.archives import archive, archives, legacy
from tests.hostile.headers import headers
from tests.hostile.indexes import indexes
from tests.hostile.pickles import CANARY, pickles, tensor_of

_MAX_SECONDS = 1.0
_MAX_BYTES = 64 << 20


@contextmanager
def quick_and_small(what: str) -> Iterator[None]:
    """Fails where the block takes a second of the processor's time, or more memory than a header is worth."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    yield
    assert time.process_time() - begin < _MAX_SECONDS, what
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < _MAX_BYTES, what


def assert_refused(folder: Path, what: str) -> None:
    with quick_and_small(what):
        try:
            found = load_state_dict(folder)
        except FastloadError as error:
            assert error.file is not None, what
            assert error.file.startswith(str(folder)), what
            assert len(str(error)) < 3_000, what
            found = None
    assert found is None, f"{what} was taken: {sorted(found or ())}"
    assert not (folder / CANARY).exists(), what


def refused_one_by_one(folder: Path, name: str, files: Iterator[tuple[str, bytes]]) -> int:
    count = 0
    for what, content in files:
        (folder / name).write_bytes(content)
        assert_refused(folder, what)
        count += 1
    return count


def test_every_hostile_pickle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    count = 0
    for container in (archive, legacy):
        made = ((f"{what}, as {container.__name__}", container(content)) for what, content in pickles())
        count += refused_one_by_one(tmp_path, "pytorch_model.bin", made)
    with capsys.disabled():
        print(f"\nhostile pickles: {count} refused")


@pytest.mark.parametrize(
    ("what", "name", "make"),
    [("archives", "pytorch_model.bin", archives), ("headers", "model.safetensors", headers)],
    ids=["archives", "headers"],
)
def test_every_hostile_file_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    name: str,
    make: Callable[[], Iterator[tuple[str, bytes]]],
) -> None:
    count = refused_one_by_one(tmp_path, name, make())
    with capsys.disabled():
        print(f"\nhostile {what}: {count} refused")


def test_every_hostile_index_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = 0
    for count, (what, write) in enumerate(indexes(), 1):
        folder = tmp_path / str(count) / "folder"
        os.makedirs(folder)
        write(folder)
        assert_refused(folder, what)
    with capsys.disabled():
        print(f"\nhostile indexes: {count} refused")


def test_compressed_storage_beyond_what_can_be_compressed_is_refused_though_all_agree_on_it(tmp_path: Path) -> None:
    n_elements = 2**29
    data = bytearray(archive(tensor_of(n_elements), zipfile.ZIP_DEFLATED))
    for signature, field in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = data.index(signature, data.index(signature) + 1)
        struct.pack_into("<I", data, at + field, 4 * n_elements)
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(ArchiveError, match="larger than what is compressed can be"):
        read_bin(str(tmp_path / "pytorch_model.bin"))
