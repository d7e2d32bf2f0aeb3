"""Folders whose index lies: by name of the lie."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["indexes"]

_INDEX = "model.safetensors.index.json"
_SHARD = "model-00001-of-00001.safetensors"


def _shard(*keys: str) -> bytes:
    rows = {key: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, key in enumerate(keys)}
    header = json.dumps(rows).encode()
    return struct.pack("<Q", len(header)) + header + bytes(len(keys))


def _with(content: object) -> Callable[[Path], None]:
    """Writes a folder with one valid shard of the key "a", and this index."""

    def write(folder: Path) -> None:
        (folder / _SHARD).write_bytes(_shard("a"))
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / _INDEX).write_bytes(text)

    return write


def indexes() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """All of them: what writes each into an empty folder."""
    for name, shard in {
        "leaves the folder": f"../{_SHARD}",
        "leaves the folder and comes back": f"../folder/{_SHARD}",
        "leaves a folder below": f"below/../../{_SHARD}",
        "is absolute": f"/{_SHARD}",
        "is absolute on another system": f"C:\\{_SHARD}",
        "is on another machine": f"//host/{_SHARD}",
        "is an address": f"file:///etc/passwd/{_SHARD}",
        "has backslashes": f"..\\{_SHARD}",
        "has a NUL": f"{_SHARD}\0.txt",
        "is half a character": "\ud800.safetensors",
        "is empty": "",
        "is the folder": ".",
        "is the folder above": "..",
        "is a folder": "./",
        "is longer than a path": "a" * 10_000,
        "is the index itself": _INDEX,
        "is the home folder": "~/model.safetensors",
        "is not there": "model-00002-of-00001.safetensors",
        "is not there, below a file": f"{_SHARD}/model.safetensors",
        "is a device": "/dev/zero",
        "is the memory of this process": "/proc/self/mem",
    }.items():
        yield f"a shard that {name}", _with({"weight_map": {"a": shard}})
    texts: dict[str, object] = {
        "nothing": b"",
        "zeros": bytes(100),
        "no JSON": b"{",
        "a list": [],
        "null": None,
        "a number": 7,
        "no map": {"metadata": {}},
        "an empty map": {"weight_map": {}},
        "a map that is a list": {"weight_map": [_SHARD]},
        "a map that is a text": {"weight_map": _SHARD},
        "a map of numbers": {"weight_map": {"a": 1}},
        "a map of lists": {"weight_map": {"a": [_SHARD]}},
        "a map of null": {"weight_map": {"a": None}},
        "a map of objects": {"weight_map": {"a": {"file": _SHARD}}},
        "metadata that are a list": {"weight_map": {"a": _SHARD}, "metadata": []},
        "metadata that are a text": {"weight_map": {"a": _SHARD}, "metadata": "x"},
        "a key twice": f'{{"weight_map":{{"a":"{_SHARD}","a":"other"}}}}'.encode(),
        "two maps": f'{{"weight_map":{{"a":"{_SHARD}"}},"weight_map":{{"a":"other"}}}}'.encode(),
        "arrays nested too deeply": b'{"weight_map":' + b"[" * 1_000_000,
        "objects nested too deeply": b'{"weight_map":' * 200_000,
        "a number of thousands of digits": b'{"weight_map":{"a":' + b"9" * 5000 + b"}}",
        "no UTF-8": b'{"weight_map":{"a":"\xff"}}',
        "a pickle": b"\x80\x02cos\nsystem\n(X\x0c\0\0\0touch harmedtR.",
        "a key that no shard holds": {"weight_map": {"a": _SHARD, "b": _SHARD}},
        "files of two formats": {"weight_map": {"a": _SHARD, "b": "pytorch_model.bin"}},
    }
    for name, content in texts.items():
        yield f"an index of {name}", _with(content)
    yield from _folders()


def _folders() -> Iterator[tuple[str, Callable[[Path], None]]]:
    good = {"weight_map": {"a": _SHARD}}

    def replaced(make: Callable[[Path], object], name: str = _SHARD) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            _with(good)(folder)
            (folder / name).unlink()
            make(folder / name)

        return write

    yield "a shard that is a pipe", replaced(os.mkfifo)
    yield "a shard that is a folder", replaced(Path.mkdir)
    yield "a shard that is a link to a device", replaced(lambda path: path.symlink_to("/dev/zero"))
    yield "a shard that is a link to itself", replaced(lambda path: path.symlink_to(path.name))
    yield "a shard that is a link to nothing", replaced(lambda path: path.symlink_to("nothing"))
    yield "a shard that is a link to a folder", replaced(lambda path: path.symlink_to("/"))
    yield "an index that is a pipe", replaced(os.mkfifo, _INDEX)
    yield "an index that is a folder", replaced(Path.mkdir, _INDEX)
    yield "an index that is a link to a device", replaced(lambda path: path.symlink_to("/dev/zero"), _INDEX)
    yield "an index that is a link to itself", replaced(lambda path: path.symlink_to(path.name), _INDEX)

    def with_single(folder: Path) -> None:
        _with(good)(folder)
        (folder / "model.safetensors").write_bytes(_shard("a"))

    def of_a_shard_twice(folder: Path) -> None:
        (folder / _SHARD).write_bytes(_shard("a", "b"))
        (folder / "other.safetensors").symlink_to(_SHARD)
        (folder / _INDEX).write_text(json.dumps({"weight_map": {"a": _SHARD, "c": "other.safetensors"}}))

    def of_gigabytes(folder: Path) -> None:
        _with(good)(folder)
        os.truncate(folder / _INDEX, 2 << 30)

    yield "a key in two shards, of which the index names one for a key that none holds", of_a_shard_twice
    yield "two checkpoints in one folder", with_single
    yield "an index of gigabytes", of_gigabytes
