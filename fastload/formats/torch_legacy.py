"""The two older containers of torch files.

*Legacy* (torch 0.2 to 1.5, and ``_use_new_zipfile_serialization=False`` since): pickles one after the other - a magic
number, a protocol version, the writer's byte order and sizes, the object, the list of storage keys - then each
storage in the order of that list, as its number of elements (int64) and its bytes.

*Tar* (before torch 0.2): an uncompressed tar of ``sys_info``, ``pickle``, ``tensors`` and ``storages``, where the
object names tensors by number, and these name storages by number.

Both keep the data little-endian whatever machine wrote them: the writer swaps (``THPStorage_writeFileRaw`` in
``torch/csrc/serialization.cpp``), so ``little_endian`` of the system information is about the writer and not the file.
Layouts from ``_legacy_save`` and ``_legacy_load`` in ``torch/serialization.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any, Final

from fastload.errors import ArchiveError, FormatError
from fastload.formats.specs import Region
from fastload.formats.torch_pickle import MAX_PICKLE_BYTES, PickleEndsEarlyError, load_pickle
from fastload.formats.torch_source import Source, Storages
from fastload.formats.torch_stubs import StorageStub, StorageType, TensorStub

__all__ = ["is_tar", "read_legacy", "read_tar"]

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_PROTOCOL: Final = 1001
_FIRST_WINDOW: Final = 64 << 10
_INT32, _INT64 = Struct("<i"), Struct("<q")
_BLOCK: Final = 512
_MAX_MEMBERS: Final = 64


class _Cursor:
    """Reads pickles and numbers one after the other from a part of a file."""

    def __init__(self, source: Source, start: int, end: int) -> None:
        self.source = source
        self.pos = start
        self.end = end

    def pickle(self, persistent_load: Callable[[object], object]) -> Any:
        """The next pickle. Its length is not known beforehand: what is read grows until it is all there."""
        n_window = _FIRST_WINDOW
        while True:
            n_bytes = min(n_window, self.end - self.pos, MAX_PICKLE_BYTES)
            data = self.source.read(self.pos, n_bytes)
            try:
                value, n_used = load_pickle(data, 0, self.source.file, persistent_load)
            except PickleEndsEarlyError:
                if n_bytes == self.end - self.pos:
                    raise self.source.truncated("a complete pickle") from None
                if n_bytes == MAX_PICKLE_BYTES:
                    raise FormatError(
                        "the pickle is too large to be that of a state dict",
                        file=self.source.file,
                        expected=f"at most {MAX_PICKLE_BYTES} bytes",
                    ) from None
                n_window *= 8
                continue
            self.pos += n_used
            return value

    def numbers(self, struct: Struct, n: int) -> tuple[int, ...]:
        n_bytes = struct.size * n
        self.skip(n_bytes)
        data = self.source.read(self.pos - n_bytes, n_bytes)
        return tuple(struct.unpack_from(data, i * struct.size)[0] for i in range(n))

    def skip(self, n_bytes: int) -> int:
        """Where the next `n_bytes` begin; TruncatedFileError where they are not all there."""
        start = self.pos
        if n_bytes > self.end - start:
            raise self.source.truncated(f"{n_bytes} bytes at byte {start}")
        self.pos += n_bytes
        return start


class _RegionTable:
    """Storages whose places are known beforehand."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, key: str, offset_bytes: int, n_bytes: int) -> None:
        if key in self._places:
            raise _damaged(self._source, "a storage is there twice", key)
        self._places[key] = (offset_bytes, n_bytes)

    def region(self, key: str, n_bytes: int, swap_bytes: int) -> Region:
        """See Storages. The bytes are never swapped (see the top of this file)."""
        offset, n_found = self._places.get(key, (0, -1))
        if n_found != n_bytes:
            raise _damaged(self._source, "a storage is missing, or has another size", key, n_bytes, n_found)
        return Region(self._source.file, offset, n_bytes)


# ---- legacy ----


def read_legacy(source: Source) -> tuple[object, Storages]:
    """The object of a file in the legacy format, and its storages."""
    cursor = _Cursor(source, 0, source.n_bytes)
    _check_magic(cursor)
    info = cursor.pickle(_no_storage)
    writer_is_big_endian = type(info) is dict and info.get("little_endian") is False
    found: dict[str, StorageStub] = {}
    root = cursor.pickle(lambda saved: _legacy_storage(saved, found, source))
    keys = cursor.pickle(_no_storage)
    if type(keys) is not list or len(keys) != len(found):
        raise _damaged(source, "its list of storages is not that of its pickle", None, len(found), type(keys).__name__)
    table = _RegionTable(source)
    for key in map(_key, keys):
        storage = found.get(key)
        if storage is None:
            raise _damaged(source, "its list of storages is not that of its pickle", key)
        dtype = storage.kind.dtype
        if dtype is None:
            raise FormatError(
                "the file holds quantised tensors",
                file=source.file,
                found=storage.kind.name,
                fix="dequantise them first",
            )
        if writer_is_big_endian and dtype.code in ("C64", "C128"):
            # The writer swaps units of the whole element, or (C128) writes what was in its buffer before.
            raise FormatError("complex tensors written on a big-endian machine are garbled", file=source.file)
        (n_elements,) = cursor.numbers(_INT64, 1)
        if n_elements != storage.n_elements:
            raise _damaged(
                source, "a storage has not the size its pickle gives it", key, storage.n_elements, n_elements
            )
        n_bytes = n_elements * dtype.itemsize
        table.add(key, cursor.skip(n_bytes), n_bytes)
    return root, table


def _check_magic(cursor: _Cursor) -> None:
    file = cursor.source.file
    try:
        magic = cursor.pickle(_no_storage)
    except FormatError:
        magic = None
    if type(magic) is not int or magic != _MAGIC:
        raise FormatError(
            "not a file that torch.save wrote",
            file=file,
            expected="a zip archive, a tar archive, or the magic number of torch's older format",
            found=repr(cursor.source.read(0, min(16, cursor.source.n_bytes))),
            fix="check that the file is complete, and a checkpoint (not a web page or a git-lfs pointer)",
        )
    version = cursor.pickle(_no_storage)
    if type(version) is not int or version != _PROTOCOL:
        raise FormatError(
            "an unknown version of torch's older format", file=file, expected=_PROTOCOL, found=type(version).__name__
        )


def _legacy_storage(saved: object, found: dict[str, StorageStub], source: Source) -> StorageStub:
    """("storage", class, key, location, n_elements, None or (key, offset, n_elements) of a part of it)."""
    if type(saved) is tuple and len(saved) == 6:
        word, kind, raw_key, _, n_elements, part = saved
        if word == "storage" and type(kind) is StorageType and type(n_elements) is int and n_elements >= 0:
            key = _key(raw_key)
            storage = StorageStub(key, kind, n_elements)
            if found.setdefault(key, storage) != storage:
                raise _damaged(source, "one storage is described in two ways", key)
            if part is None:
                return storage
            if type(part) is tuple and len(part) == 3 and type(part[1]) is int and 0 <= part[1] <= n_elements:
                return storage._replace(offset=part[1])
    raise _damaged(source, "a storage is not described as torch does it")


def _no_storage(_: object) -> object:
    raise FormatError("the pickle is damaged: it refers to a storage where there is none")


def _key(value: object) -> str:
    # Strings since torch 0.2; numbers in the tar format.
    if type(value) is str or (type(value) is int and value.bit_length() <= 64):
        return str(value)
    raise FormatError("the pickle is damaged: a storage has no name", found=type(value).__name__)


# ---- tar ----


def is_tar(start: bytes) -> bool:
    """Whether a file that begins with these 512 bytes is a tar archive."""
    return start[257:262] == b"ustar"


def read_tar(source: Source) -> tuple[object, Storages]:
    """The object of a file in the tar format, and its storages."""
    members = _tar_members(source)
    missing = {"pickle", "storages", "tensors"} - members.keys()
    if missing:
        raise _damaged(
            source, "a tar archive that torch did not write", None, "pickle, storages and tensors", f"no {min(missing)}"
        )
    table = _RegionTable(source)
    storages = _tar_storages(_Cursor(source, *members["storages"]), table, source)
    tensors = _tar_tensors(_Cursor(source, *members["tensors"]), storages, source)

    def load(saved: object) -> object:
        value = tensors.get(_key(saved)) or storages.get(_key(saved))
        if value is None:
            raise _damaged(source, "the pickle names a tensor that is not there", _key(saved))
        return value

    return _Cursor(source, *members["pickle"]).pickle(load), table


def _tar_storages(cursor: _Cursor, table: _RegionTable, source: Source) -> dict[str, StorageStub]:
    storages: dict[str, StorageStub] = {}
    for _ in range(_count(cursor.pickle(_no_storage), source)):
        described = cursor.pickle(_no_storage)
        if type(described) is not tuple or len(described) != 3 or type(described[2]) is not StorageType:
            raise _damaged(source, "a storage is not described as torch does it")
        key, kind = _key(described[0]), described[2]
        if kind.dtype is None:
            raise FormatError("the file holds quantised tensors", file=source.file, found=kind.name)
        (n_elements,) = cursor.numbers(_INT64, 1)
        n_bytes = _count(n_elements, source) * kind.dtype.itemsize
        table.add(key, cursor.skip(n_bytes), n_bytes)
        storages[key] = StorageStub(key, kind, n_elements)
    parts = cursor.pickle(_no_storage)
    if type(parts) is not list:
        raise _damaged(source, "it has no list of parts of storages")
    for part in parts:
        if type(part) is not tuple or len(part) != 4 or _key(part[1]) not in storages or _key(part[0]) in storages:
            raise _damaged(source, "a part of a storage is not described as torch does it")
        root = storages[_key(part[1])]
        storages[_key(part[0])] = root._replace(offset=root.offset + _count(part[2], source))
    return storages


def _tar_tensors(cursor: _Cursor, storages: dict[str, StorageStub], source: Source) -> dict[str, TensorStub]:
    tensors: dict[str, TensorStub] = {}
    for _ in range(_count(cursor.pickle(_no_storage), source)):
        described = cursor.pickle(_no_storage)
        if type(described) is not tuple or len(described) != 3 or _key(described[1]) not in storages:
            raise _damaged(source, "a tensor is not described as torch does it")
        storage = storages[_key(described[1])]
        n_dimensions, _ = cursor.numbers(_INT32, 2)
        if not 0 <= n_dimensions <= 64:
            raise _damaged(source, "a tensor has an impossible number of dimensions", None, "0 to 64", n_dimensions)
        numbers = cursor.numbers(_INT64, 2 * n_dimensions + 1)
        if min(numbers) < 0:
            raise _damaged(source, "a tensor has a negative size")
        shape, stride = numbers[:n_dimensions], numbers[n_dimensions:-1]
        offset = storage.offset + numbers[-1]
        tensor = TensorStub(storage.key, storage.kind, storage.n_elements, offset, shape, stride, None)
        if tensors.setdefault(_key(described[0]), tensor) is not tensor:
            raise _damaged(source, "a tensor is there twice")
    return tensors


def _tar_members(source: Source) -> dict[str, tuple[int, int]]:
    """Start and end of each member. Field positions: POSIX.1-1988 ustar, as in ``pax(1)``."""
    members: dict[str, tuple[int, int]] = {}
    pos = 0
    for _ in range(_MAX_MEMBERS):
        if pos + _BLOCK > source.n_bytes:
            break
        header = source.read(pos, _BLOCK)
        if not any(header):
            break
        checksum = sum(header) - sum(header[148:156]) + 8 * 0x20
        size = _octal(header[124:136], source)
        if _octal(header[148:156], source) != checksum:
            raise _damaged(source, "the checksum of a tar header is wrong")
        name, kind = header[:100].rstrip(b"\0").decode("utf-8", "replace"), header[156:157]
        pos += _BLOCK
        if size > source.n_bytes - pos:
            raise source.truncated(f"{size} bytes of {name!r} at byte {pos}")
        if kind in (b"x", b"g"):
            # Python's tarfile wrote one before each member, for fractions of seconds in its time. Others are not known.
            records = source.read(pos, min(size, 1 << 16))
            if b" size=" in records or b" path=" in records:
                raise _damaged(source, "a tar header overrides the next one")
        elif kind not in (b"0", b"\0") or name in members:
            raise _damaged(source, "a tar member is not a plain file, or is there twice", name)
        else:
            members[name] = (pos, pos + size)
        pos += (size + _BLOCK - 1) // _BLOCK * _BLOCK
    return members


def _octal(field: bytes, source: Source) -> int:
    text = field.strip(b" \0")
    if field[:1] >= b"\x80":  # large numbers are written in base 256
        return int.from_bytes(field[1:], "big")
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise _damaged(source, "a tar header has a field that is not a number")
    return int(text, 8)


def _count(value: object, source: Source) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _damaged(source, "a number is not a count", None, "0 or more", type(value).__name__)
    return value


def _damaged(
    source: Source, problem: str, key: str | None = None, expected: object = None, found: object = None
) -> ArchiveError:
    return ArchiveError(
        f"the torch file is damaged: {problem}",
        file=source.file,
        key=key,
        expected=expected,
        found=found,
        fix="copy or download the file again",
    )
