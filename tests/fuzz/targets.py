"""What is fuzzed: functions of some bytes that raise where a reader breaks a promise.

A reader may refuse any input, with an error of fastload that names the file; anything else that it raises is a
finding. What it accepts is checked: regions lie in the file, names below the folder, the two ways of the pickle
machine agree, and of a safetensors file the official reader sees the same tensors. ``python -m tests.fuzz`` runs these
with coverage guiding the inputs (atheris); the tests run them on the corpus and on inputs that hypothesis makes.
"""

from __future__ import annotations

import os
import posixpath
import re
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

from safetensors import SafetensorError, deserialize

from fastload.errors import FastloadError
from fastload.formats.index import read_index
from fastload.formats.safetensors import read_header
from fastload.formats.specs import FileContents, TensorSpec
from fastload.formats.torch_bin import read_bin
from fastload.formats.torch_machine import Machine
from fastload.formats.torch_opcodes import HANDLERS
from fastload.formats.torch_pickle import load_pickle
from fastload.formats.torch_stubs import StorageStub, StorageType
from fastload.sources.journal import read_journal
from fastload.storage.decoding import decode
from tests.fuzz.differences import difference_of

__all__ = ["TARGETS", "check_as_official", "file_of"]

_MAX_DATA_BYTES = 4096
_MAX_MESSAGE = 10_000
_END = re.compile(rb"[0-9]\s*,\s*([0-9]{1,4})\s*\]\s*[,}]")


@cache
def _descriptor() -> int:
    return os.memfd_create("fuzzed")


def file_of(content: bytes) -> str:
    """The path of a file in memory with this content; the same file each time."""
    descriptor = _descriptor()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))
    return f"/proc/self/fd/{descriptor}"


def _accepted(read: Callable[[str], Any], path: str) -> Any:
    """What a reader makes of a file; None where it refuses it as it should."""
    try:
        return read(path)
    except FastloadError as error:
        assert error.file == path, f"an error that does not name the file: {error}"
        assert len(str(error)) < _MAX_MESSAGE, "an error that is a page long"
        return None


# ---- safetensors ----


def safetensors_header(data: bytes) -> None:
    """The text of a header; it gets its length, and as many bytes of data as its largest offset asks for."""
    n_data = max(map(int, _END.findall(data)), default=0)
    check_as_official(struct.pack("<Q", len(data)) + data + bytes(i % 251 for i in range(min(n_data, _MAX_DATA_BYTES))))


def safetensors_file(data: bytes) -> None:
    """A whole file."""
    check_as_official(data)


def check_as_official(content: bytes) -> bool:
    """Whether a file is accepted; it is if the official reader does, but for the list of differences."""
    try:
        expected = {key: (row["dtype"], row["shape"], bytes(row["data"])) for key, row in deserialize(content)}
    except SafetensorError:
        expected = None
    contents: FileContents | None = _accepted(read_header, file_of(content))
    if contents is None:
        if expected is not None:
            n_header = int.from_bytes(content[:8], "little")
            assert difference_of(content[8 : 8 + n_header]), "refused, but for no reason on the list"
        return False
    assert expected is not None, "accepted, where the official reader refuses"
    assert {spec.key: _as_official(spec, content) for spec in contents.specs} == expected
    return True


def _as_official(spec: TensorSpec, content: bytes) -> tuple[str, list[int], bytes]:
    region, packed = spec.region, spec.dtype.elements_per_item
    counts = list(spec.shape) if packed == 1 else [*spec.shape[:-1], spec.shape[-1] * packed]
    return spec.dtype.code, counts, content[region.offset_bytes : region.offset_bytes + region.n_bytes]


# ---- index and journal ----


def shard_index(data: bytes) -> None:
    """An index: every name that is accepted lies below the folder."""
    index = _accepted(read_index, file_of(data))
    if index is not None:
        for name in index.shards:
            _check_below(name)


def journal(data: bytes) -> None:
    """The journal of a save: every name that is accepted is one of a file in the folder."""
    path = file_of(data)
    folder = f"/dev/shm/fastload-fuzz-{os.getpid()}"
    os.makedirs(folder, exist_ok=True)
    link = os.path.join(folder, ".fastload-commit.json")
    if not os.path.lexists(link):
        os.symlink(f"/proc/{os.getpid()}/fd/{os.path.basename(path)}", link)
    try:
        found = read_journal(folder)
    except FastloadError as error:
        assert error.file == link
        return
    finally:
        os.unlink(link)
        os.rmdir(folder)
    assert found is not None
    for name in [*found.renames, *found.renames.values(), *found.superseded]:
        _check_below(name)
        assert "/" not in name


def _check_below(name: str) -> None:
    os.fsencode(name)
    assert posixpath.normpath(posixpath.join("/folder/below", name)).startswith("/folder/below/"), name
    assert not set(name) & {"\0", "\\"}, name


# ---- files of torch ----


def pickle_machine(data: bytes) -> None:
    """A pickle. What the machine makes of it with whole records is what it makes of it step by step."""

    def load(_: str) -> tuple[object, int]:
        return load_pickle(data, 0, "file", _storage)

    found = _accepted(load, "file")
    plain = Machine(data + bytes(32), len(data), "file", _storage, use_records=False)
    try:
        pos = 0
        while pos >= 0:
            pos = HANDLERS[plain.data[pos]](plain, pos + 1)
    except Exception:  # noqa: BLE001  load_pickle makes errors of ours of them
        assert found is None, "accepted with records, refused without"
        return
    assert found is not None, "refused with records, accepted without"
    assert (_shown(found[0]), found[1]) == (_shown(plain.stack.pop()), plain.end)


def _shown(value: object) -> str:
    """Values as text, so that NaN is equal to itself and a list may hold itself. Not too long."""
    try:
        return repr(_cut(value, 6))
    except RecursionError:
        return "deep"


def _cut(value: Any, depth: int) -> Any:
    if depth == 0:
        return type(value)
    if isinstance(value, dict):
        return [(_cut(k, depth - 1), _cut(v, depth - 1)) for k, v in list(value.items())[:20]]
    if isinstance(value, (list, tuple)):
        return [type(value), *(_cut(item, depth - 1) for item in value[:20])]
    return value


def _storage(saved: object) -> StorageStub:
    if type(saved) is tuple and len(saved) == 5 and type(saved[1]) is StorageType:
        return StorageStub(str(saved[2])[:50], saved[1], 10)
    raise ValueError("not a storage")


def torch_file(data: bytes) -> None:
    """A whole file, of whichever container: regions and views lie where there are bytes for them."""
    contents: FileContents | None = _accepted(read_bin, file_of(data))
    if contents is None:
        return
    for spec in contents.specs:
        region = spec.region
        n_stored = region.n_bytes if region.encoding is None else region.encoding.n_bytes
        assert region.offset_bytes >= 0
        assert region.offset_bytes + n_stored <= len(data)
        if spec.view is not None and 0 not in spec.shape:
            steps = ((size - 1) * step for size, step in zip(spec.shape, spec.view.stride, strict=True))
            assert (spec.view.offset + sum(steps) + 1) * spec.dtype.itemsize <= region.n_bytes
        if region.encoding is not None and region.n_bytes <= 1 << 20:
            _accepted(lambda _, region=region: decode(bytearray(data), region, _memory(region.n_bytes)), region.file)


def _memory(n_bytes: int) -> memoryview:
    return memoryview(bytearray(n_bytes))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (safetensors_header, safetensors_file, shard_index, journal, pickle_machine, torch_file)
}
