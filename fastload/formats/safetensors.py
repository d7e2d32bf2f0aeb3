"""The header of a safetensors file, read without torch and without the safetensors package.

A file is a little-endian u64, that many bytes of JSON, and the bytes of the tensors without holes:

    {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}

Every rule of the format is checked before the first spec is returned: a file that breaks one raises, and
neither what the header claims nor how deep it is decides how much memory is taken. The reader is stricter
than the official one (safetensors 0.8) where leniency would let two readers see different tensors: a name
given twice is refused, as are whitespace before the first brace (the format's text forbids it) and entries in
the form of arrays.

Headers come in one form in practice: compact, with the fields in this order. A regular expression takes that
apart at a third of the price of parsing JSON into dictionaries; what it does not match in full goes to
``json``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from itertools import repeat
from math import isinf, prod
from operator import itemgetter, sub
from typing import Any, NamedTuple, NoReturn

from fastload.dtypes import DTYPES, DType, from_code
from fastload.errors import (
    CheckpointNotFoundError,
    HeaderError,
    TruncatedFileError,
    UnknownDtypeError,
    UnreadableFileError,
)
from fastload.formats.specs import FileContents, Region, TensorSpec

__all__ = ["CODES", "MAX_HEADER_BYTES", "METADATA", "PREFIX_BYTES", "read_header"]

# The official reader's limit; the official writer can make no larger header that could be read.
MAX_HEADER_BYTES = 100_000_000

PREFIX_BYTES = 8
METADATA = "__metadata__"
# torch counts elements in a signed 64-bit integer.
_MAX_ELEMENTS = 2**63 - 1
# Of an integer that a count can be; longer ones are read as floating point numbers, as the official reader does.
_MAX_DIGITS = 20
# Braces and brackets around each other, as the official reader counts them.
_MAX_DEPTH = 127
CODES = {code: dtype for code, dtype in DTYPES.items() if code != "C128"}

_USUAL_METADATA = re.compile(rf'\{{"{METADATA}": ?')
_USUAL_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]*)": ?'
    r'\{("dtype": ?"[A-Z0-9_]+", ?"shape": ?\[[0-9, ]*\]), ?'
    r'"data_offsets": ?\[(0|[1-9][0-9]{0,17}), ?(0|[1-9][0-9]{0,17})\]\}'
    r'(?:, ?(?=")|\}\Z)'
)


class _Columns(NamedTuple):
    """The tensors of a header as parallel lists, so that 100,000 of them are checked by comparing two lists.

    Sizes are what shape and type ask for; begins and ends are what the header says. All are bytes.
    """

    keys: Sequence[str]
    dtypes: Sequence[DType]
    shapes: Sequence[tuple[int, ...]]
    sizes: Sequence[int]
    begins: Sequence[int]
    ends: Sequence[int]


def read_header(path: str, descriptor: int | None = None) -> FileContents:
    """Describe the tensors of a safetensors file. Reads the header only.

    Args:
        path: the file.
        descriptor: the file, if it is open already; it stays open.

    Returns:
        Its specs in the order of their bytes in the file, ``__metadata__``, and the file's size. Shapes are
        torch's: where torch packs two 4-bit elements into one item, the last dimension is half the header's.
        Each region is exactly its tensor's bytes.

    Raises:
        CheckpointNotFoundError: no such file.
        UnreadableFileError: the operating system refused, or the path is no regular file.
        TruncatedFileError: the file ends before the header or before the data.
        HeaderError: the header breaks a rule of the format.
        UnknownDtypeError: a data type that the format does not have.
    """
    raw, status = _read_raw(path, descriptor)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(
            "the header is not UTF-8",
            file=path,
            expected="UTF-8",
            found=f"byte {error.start}: {error.reason}",
        ) from None
    if not text.startswith("{"):
        raise HeaderError(
            "the header does not begin with a brace",
            file=path,
            expected="'{'",
            found=repr(text[:20]),
            fix="make sure that this is a safetensors file",
        )
    metadata, columns = _parse_usual(path, text) or _parse_json(path, text)
    data_offset = PREFIX_BYTES + len(raw)
    columns = _checked_layout(path, columns, status.st_size - data_offset)
    # tuple.__new__ makes a named tuple at a third of the price of calling its class.
    offsets = [data_offset + begin for begin in columns.begins]
    regions = map(tuple.__new__, repeat(Region), zip(repeat(path), offsets, columns.sizes, repeat(None), strict=False))
    rows = zip(columns.keys, columns.dtypes, columns.shapes, regions, repeat(None), strict=False)
    specs: tuple[TensorSpec, ...] = tuple(map(tuple.__new__, repeat(TensorSpec), rows))
    return FileContents(specs, metadata, status.st_size, status.st_mtime_ns)


def _read_raw(path: str, held: int | None) -> tuple[bytes, os.stat_result]:
    """The bytes of the header, and what the system says of the file."""
    try:
        # Opening a named pipe would otherwise wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) if held is None else held
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            n_header_bytes = _header_length(path, _pread(descriptor, PREFIX_BYTES, 0), status.st_size)
            raw = _pread(descriptor, n_header_bytes, PREFIX_BYTES)
        finally:
            if held is None:
                os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFoundError("there is no such file", file=path) from None
    except OSError as error:
        raise UnreadableFileError("the file cannot be read", file=path, found=error.strerror) from error
    if len(raw) != n_header_bytes:
        raise TruncatedFileError(
            "the file was cut while its header was read", file=path, expected=n_header_bytes, found=len(raw)
        )
    return raw, status


def _pread(descriptor: int, n_bytes: int, offset_bytes: int) -> bytes:
    """So many bytes, or fewer where the file ends. One call may give less than there is."""
    data = os.pread(descriptor, n_bytes, offset_bytes)
    while len(data) < n_bytes and (more := os.pread(descriptor, n_bytes - len(data), offset_bytes + len(data))):
        data += more
    return data


def _header_length(path: str, prefix: bytes, n_file_bytes: int) -> int:
    if len(prefix) < PREFIX_BYTES:
        raise TruncatedFileError(
            "the file is too short to be a safetensors file",
            file=path,
            expected=f"at least {PREFIX_BYTES} bytes",
            found=f"{len(prefix)} bytes",
            fix="download or copy the file again",
        )
    n_header_bytes = int.from_bytes(prefix, "little")
    if n_header_bytes > MAX_HEADER_BYTES:
        raise HeaderError(
            "the header claims to be longer than the format allows",
            file=path,
            expected=f"at most {MAX_HEADER_BYTES:,} bytes",
            found=f"{n_header_bytes:,} bytes",
            fix="make sure that this is a safetensors file",
        )
    if PREFIX_BYTES + n_header_bytes > n_file_bytes:
        raise TruncatedFileError(
            "the file ends before its header does",
            file=path,
            expected=f"a header of {n_header_bytes:,} bytes",
            found=f"a file of {n_file_bytes:,} bytes",
            fix="download or copy the file again",
        )
    return n_header_bytes


def _parse_usual(path: str, text: str) -> tuple[dict[str, str], _Columns] | None:
    """Take apart a header in the usual form; None where it is in any other, or may be wrong."""
    text = text.rstrip(" ")
    metadata: dict[str, str] = {}
    start = 1
    if opening := _USUAL_METADATA.match(text):
        try:
            found, end = _decoder(path).raw_decode(text, opening.end())
        except (ValueError, RecursionError):
            return None
        start = end + (2 if text.startswith(", ", end) else 1)
        if text[end : end + 1] != "," or "\\u" in text[:end]:
            return None
        metadata = _checked_metadata(path, found)
    pieces = _USUAL_ENTRY.split(text[start:])
    keys, forms, begins, ends = (pieces[group::5] for group in (1, 2, 3, 4))
    unique = set(keys)
    # What stands between the matches, before the first and after the last has to be nothing.
    if not keys or any(pieces[::5]) or len(unique) != len(keys) or METADATA in unique:
        return None
    # A checkpoint has few pairs of type and shape, each many times over.
    known: dict[str, tuple[DType, tuple[int, ...], int]] = {}
    for form, key in dict(zip(forms, keys, strict=True)).items():
        try:
            entry = json.loads(f"{{{form}}}")
        except ValueError:
            return None
        known[form] = _checked_form(path, key, entry)
    dtypes = [known[form][0] for form in forms]
    shapes = [known[form][1] for form in forms]
    sizes = [known[form][2] for form in forms]
    numbers = list(map(int, ends))
    # Tensors mostly lie end to end in the header's order, and equal digits are equal numbers.
    in_order = begins[0] == "0" and begins[1:] == ends[:-1]
    return metadata, _Columns(
        keys, dtypes, shapes, sizes, [0, *numbers[:-1]] if in_order else list(map(int, begins)), numbers
    )


def _parse_json(path: str, text: str) -> tuple[dict[str, str], _Columns]:
    """Take apart a header in any form that JSON allows."""
    try:
        header = _decoder(path).decode(text)
    except json.JSONDecodeError as error:
        raise HeaderError("the header is not JSON", file=path, found=str(error)) from None
    except RecursionError:
        raise _too_deep(path) from None
    _check_depth(path, header)
    if "\\u" in text:
        _check_surrogates(path, header)
    metadata = _checked_metadata(path, header.pop(METADATA, None))
    rows = []
    for key, entry in header.items():
        if not isinstance(entry, dict):
            _refuse(path, key, "the entry of a tensor is not an object", "an object", entry)
        dtype, shape, size = _checked_form(path, key, entry)
        offsets = entry.get("data_offsets")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
            _refuse(path, key, "data_offsets are not two offsets", "[begin, end]", offsets)
        rows.append((key, dtype, shape, size, *offsets))
    return metadata, _columns(rows)


def _columns(rows: Sequence[tuple[str, DType, tuple[int, ...], int, int, int]]) -> _Columns:
    return _Columns(*zip(*rows, strict=True)) if rows else _Columns((), (), (), (), (), ())


def _decoder(path: str) -> json.JSONDecoder:
    """A decoder that refuses what Python's lets pass: names given twice, NaN, numbers beyond a double."""

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise HeaderError(
                "a name is given twice in the header",
                file=path,
                key=twice,
                expected="each name once",
                fix="write the file again: readers disagree on which of the two counts",
            )
        return names

    def refuse_constant(name: str) -> NoReturn:
        raise HeaderError("the header is not JSON", file=path, found=name)

    def to_float(digits: str) -> float:
        value = float(digits)
        if isinf(value):
            raise HeaderError("a number in the header is beyond any", file=path, found=f"{digits[:20]}...")
        return value

    def to_int(digits: str) -> int | float:
        # -0 is no count, and not equal to one in every reader.
        return int(digits) if len(digits) <= _MAX_DIGITS and digits != "-0" else to_float(digits)

    return json.JSONDecoder(
        object_pairs_hook=to_object, parse_constant=refuse_constant, parse_float=to_float, parse_int=to_int
    )


def _check_depth(path: str, header: dict[str, Any]) -> None:
    """Refuse what is nested deeper than the official reader follows, be it in a field that no reader knows."""
    level: list[Any] = [header]
    for _ in range(_MAX_DEPTH):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
        if not level:
            return
    raise _too_deep(path)


def _too_deep(path: str) -> HeaderError:
    return HeaderError("the header is nested too deeply", file=path, expected=f"at most {_MAX_DEPTH} levels")


def _check_surrogates(path: str, header: dict[str, Any]) -> None:
    """Refuse an escaped half of a character, wherever it is: it cannot be printed."""
    try:
        json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start : error.end])
        raise HeaderError("a text in the header is not Unicode", file=path, found=found) from None


def _checked_metadata(path: str, metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, METADATA, "the metadata is not an object of texts", "text for each name", metadata)
    return metadata


def _checked_form(path: str, key: str, entry: dict[str, Any]) -> tuple[DType, tuple[int, ...], int]:
    """Type, torch's shape and number of bytes of a header's entry."""
    code, counts = entry.get("dtype"), entry.get("shape")
    dtype = CODES.get(code) if isinstance(code, str) else None
    if dtype is None:
        if code == "C128":
            raise UnknownDtypeError("the format has no such data type", file=path, key=key, found=repr(code))
        dtype = from_code(code, file=path, key=key)  # type: ignore[arg-type]
    if not isinstance(counts, list) or not all(map(_is_count, counts)):
        _refuse(path, key, "the shape of a tensor is not a list of counts", "integers from 0 up", counts)
    if _is_beyond_memory(counts):
        _refuse(path, key, "the shape of a tensor is beyond any memory", f"at most {_MAX_ELEMENTS}", counts)
    n_bits = prod(counts) * dtype.n_bits
    shape = tuple(counts)
    if dtype.elements_per_item != 1:
        # Items are made of whole rows' neighbours: the last dimension has to fill them.
        if not shape or shape[-1] % dtype.elements_per_item:
            n_bits = 1
        else:
            shape = (*shape[:-1], shape[-1] // dtype.elements_per_item)
    if n_bits % 8:
        _refuse(path, key, f"a tensor of {dtype} does not end with a byte", "a shape that fills bytes", counts)
    return dtype, shape, n_bits // 8


def _is_beyond_memory(counts: list[int]) -> bool:
    """Whether the counts multiply to more than torch counts to, zeros aside. No further is multiplied."""
    n_elements = 1
    for count in filter(None, counts):
        n_elements *= count
        if n_elements > _MAX_ELEMENTS:
            return True
    return False


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _checked_layout(path: str, columns: _Columns, n_data_bytes: int) -> _Columns:
    """The columns sorted by offset: tensors that cover the data end to end, each with the bytes it needs."""
    if list(columns.begins) != [0, *columns.ends][: len(columns.ends)]:
        columns = _columns(sorted(zip(*columns, strict=True), key=itemgetter(4, 5)))
    position = 0
    if (
        list(map(sub, columns.ends, columns.begins)) != list(columns.sizes)
        or list(columns.begins) != [0, *columns.ends][: len(columns.ends)]
    ):
        for key, dtype, shape, size, begin, end in zip(*columns, strict=True):
            if end - begin != size:
                needed = f"{size} bytes, for {dtype} {_shortened(list(shape))}"
                _refuse(path, key, "shape and data type do not give the length", needed, f"{end - begin} bytes")
            if begin != position:
                problem = "overlaps another" if begin < position else "lies behind a hole"
                _refuse(path, key, f"a tensor {problem}", f"begin at {position}", f"begin at {begin}")
            position = end
    position = columns.ends[-1] if columns.ends else 0
    if position > n_data_bytes:
        raise TruncatedFileError(
            "the file ends before its tensors do",
            file=path,
            key=columns.keys[-1],
            expected=f"{position:,} bytes of data",
            found=f"{n_data_bytes:,} bytes",
            fix="download or copy the file again",
        )
    if position < n_data_bytes:
        raise HeaderError(
            "the file goes on after its last tensor",
            file=path,
            expected=f"{position:,} bytes of data",
            found=f"{n_data_bytes:,} bytes",
            fix="write the file again",
        )
    return columns


def _refuse(path: str, key: str, problem: str, expected: str, found: object) -> NoReturn:
    raise HeaderError(problem, file=path, key=key, expected=expected, found=_shortened(found))


def _shortened(found: object) -> str:
    text = found if isinstance(found, str) else repr(found)
    return text if len(text) <= 120 else text[:117] + "..."
