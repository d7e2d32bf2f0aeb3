"""Archives that lie about themselves: by name of the lie."""

from __future__ import annotations

import io
import pickle
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator

import torch

__all__ = ["archive", "archives", "legacy"]

_MAGIC = 0x1950A86A20F9469CFC6C


def archive(data_pkl: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as torch writes it, around a pickle, with one storage of 16 bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        file.writestr("archive/data.pkl", data_pkl)
        file.writestr("archive/data/0", bytes(16))
        file.writestr("archive/version", "3\n")
    return stream.getvalue()


def legacy(data_pkl: bytes) -> bytes:
    """A file in torch's older format, around a pickle."""
    return b"".join(pickle.dumps(part, protocol=2) for part in (_MAGIC, 1001, {"little_endian": True})) + data_pkl


def _good() -> tuple[bytes, bytes]:
    """A valid archive and its pickle."""
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, stream)
    with zipfile.ZipFile(stream) as file:
        data_pkl = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    return archive(data_pkl), data_pkl


def _changed(data: bytes, at: int, form: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, *values)
    return bytes(changed)


def _find(data: bytes, signature: bytes, number: int = 0) -> int:
    at = -1
    for _ in range(number + 1):
        at = data.index(signature, at + 1)
    return at


def archives() -> Iterator[tuple[str, bytes]]:
    """All of them."""
    good, data_pkl = _good()
    first, storage = _find(good, b"PK\1\2"), _find(good, b"PK\1\2", 1)
    local, end = _find(good, b"PK\3\4", 1), _find(good, b"PK\5\6")
    fields: dict[str, tuple[int, str, int]] = {
        "an encrypted entry": (storage + 8, "<H", 1),
        "strong encryption": (storage + 8, "<H", 1 << 6),
        "a patch in place of an entry": (storage + 8, "<H", 1 << 5),
        "an encrypted local header": (local + 6, "<H", 1),
        "compression that is not known": (storage + 10, "<H", 12),
        "other compression in the local header": (local + 8, "<H", 8),
        "a storage that is shorter in the directory": (storage + 24, "<I", 8),
        "a storage that is shorter in its header": (local + 22, "<I", 8),
        "a storage of four gigabytes": (storage + 20, "<I", 0xFFFFFFFE),
        "a storage of 64-bit sizes that are not there": (storage + 20, "<I", 0xFFFFFFFF),
        "an entry on another disk": (storage + 34, "<H", 1),
        "an entry beyond the file": (storage + 42, "<I", 0x7FFFFFFF),
        "an entry inside of another": (storage + 42, "<I", 10),
        "two entries in one place": (storage + 42, "<I", 0),
        "an entry in the directory itself": (storage + 42, "<I", first),
        "an extra field beyond the entry": (local + 28, "<H", 0xFFFF),
        "a name longer than the directory": (first + 28, "<H", 0xFFFF),
        "a comment longer than the directory": (first + 32, "<H", 0xFFFF),
        "a directory of other signatures": (first, "<I", 0),
        "a local header of another signature": (local, "<I", 0),
        "more entries than there are": (end + 8, "<I", 4 | 4 << 16),
        "fewer entries than there are": (end + 8, "<I", 2 | 2 << 16),
        "entries on this disk and others": (end + 8, "<H", 1),
        "a directory that is too long": (end + 12, "<I", 0x7FFFFFFF),
        "a directory that begins elsewhere": (end + 16, "<I", first + 1),
        "a directory of four gigabytes": (end + 12, "<I", 0xFFFFFFFF),
        "a comment that is not there": (end + 20, "<H", 100),
        "one disk of several": (end + 4, "<H", 1),
    }
    for name, (at, form, value) in fields.items():
        yield name, _changed(good, at, form, value)
    renamed: dict[str, Callable[[bytes], bytes]] = {
        "a local header of another name": lambda data: data.replace(b"archive/data/0", b"archive/data/1", 1),
        "a directory of another name": lambda data: data[:first] + data[first:].replace(b"data/0", b"data/1"),
        "a pickle of another name": lambda data: data.replace(b"archive/data.pkl", b"archive/data.pkx"),
        "a local header and nothing else": lambda data: data[:first],
        "half an archive": lambda data: data[: len(data) // 2],
    }
    for name, change in renamed.items():
        yield name, change(good)
    yield from _written(data_pkl)
    yield from _zip64(good, end)


def _written(data_pkl: bytes) -> Iterator[tuple[str, bytes]]:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    raw = bomb.compress(bytes(64 << 20)) + bomb.flush()
    assert len(raw) < 1 << 17
    yield "a pickle that is a bomb", archive(bytes(64 << 20), zipfile.ZIP_DEFLATED)
    deflated = archive(data_pkl, zipfile.ZIP_DEFLATED)
    yield "a compressed pickle of another checksum", _changed(deflated, _find(deflated, b"PK\1\2") + 16, "<I", 1)
    yield (
        "a compressed pickle that claims gigabytes",
        _changed(deflated, _find(deflated, b"PK\1\2") + 24, "<I", 1 << 31),
    )
    at = deflated.index(b"archive/data.pkl") + len(b"archive/data.pkl")
    yield "a compressed pickle that is damaged", deflated[: at + 5] + bytes(20) + deflated[at + 25 :]
    storage = _find(deflated, b"PK\1\2", 1)
    yield "a compressed storage that claims gigabytes", _changed(deflated, storage + 24, "<I", 1 << 31)
    at = _find(deflated, b"PK\3\4", 1)
    lied = _changed(_changed(deflated, at + 22, "<I", 1 << 31), storage + 24, "<I", 1 << 31)
    yield "a compressed storage of gigabytes, in both headers", lied
    for name, entries in {
        "two pickles": ["archive/data.pkl", "other/data.pkl"],
        "no pickle": ["archive/data/0"],
        "a pickle at the top": ["data.pkl"],
        "a program of TorchScript": ["archive/data.pkl", "archive/constants.pkl"],
        "storages outside of the folder": ["archive/data.pkl", "../archive/data/0", "/archive/data/0"],
    }.items():
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            for entry in entries:
                file.writestr(entry, data_pkl if entry.endswith(".pkl") else bytes(16))
        yield name, stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", data_pkl)
        link = zipfile.ZipInfo("archive/data/0")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
    yield "a storage that is a link", stream.getvalue()
    yield "a storage twice", _with_entry(data_pkl, "archive/data/1", bytes(16)).replace(b"data/1", b"data/0")
    yield "a pickle twice", _with_entry(data_pkl, "archive/data.pkx", data_pkl).replace(b"data.pkx", b"data.pkl")
    yield "a byte order that is none", _with_entry(data_pkl, "archive/byteorder", b"middle")
    yield "a byte order of gigabytes", _with_entry(data_pkl, "archive/byteorder", bytes(1 << 20))


def _with_entry(data_pkl: bytes, name: str, content: bytes) -> bytes:
    stream = io.BytesIO(archive(data_pkl))
    with zipfile.ZipFile(stream, "a") as file:
        file.writestr(name, content)
    return stream.getvalue()


def _zip64(good: bytes, end: int) -> Iterator[tuple[str, bytes]]:
    """A 64-bit end record before the end, with one lie in it."""
    n_bytes, offset = struct.unpack_from("<II", good, end + 12)
    values = {"disk": 0, "directory_disk": 0, "n_here": 3, "n_entries": 3, "n_bytes": n_bytes, "offset": offset}
    for name, lie in {
        "a 64-bit directory of exabytes": {"n_bytes": 2**62},
        "a 64-bit directory beyond the file": {"offset": 2**62},
        "a 64-bit directory that wraps around": {"offset": 2**64 - 1, "n_bytes": 2},
        "a 64-bit count of entries": {"n_here": 2**62, "n_entries": 2**62},
        "64-bit disks": {"disk": 1},
    }.items():
        record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, *(values | lie).values())
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
        yield name, good[:end] + record + locator + good[end:]
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 2**63, 1)
    yield "a 64-bit end record beyond the file", good[:end] + locator + good[end:]
    yield (
        "a 64-bit end record that is none",
        good[:end] + bytes(56) + struct.pack("<4sIQI", b"PK\6\7", 0, end, 1) + good[end:],
    )
