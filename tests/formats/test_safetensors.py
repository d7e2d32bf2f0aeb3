"""The header reader against the official one: what that accepts is read, what it refuses is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file

from fastload.dtypes import DTYPES, to_torch
from fastload.errors import (
    CheckpointNotFoundError,
    FormatError,
    HeaderError,
    OptionError,
    TruncatedFileError,
    UnknownDtypeError,
    UnreadableFileError,
)
from fastload.formats.safetensors import read_header
from fastload.formats.safetensors_layout import DATA_ALIGNMENT, encode_header
from fastload.formats.specs import FileContents

ENTRY = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
SHARED = [d for d in DTYPES.values() if hasattr(torch, d.torch_name or "") and d.code != "C128"]


def file_bytes(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def read(tmp_path: Path, content: bytes) -> FileContents:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return read_header(str(path))


def official(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the official reader finds, by key; None where it refuses."""
    try:
        return {key: (info["dtype"], info["shape"], bytes(info["data"])) for key, info in deserialize(content)}
    except SafetensorError:
        return None


def as_official(contents: FileContents, content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    found = {}
    for key, dtype, shape, region, view in contents.specs:
        assert view is None
        counts = [*shape[:-1], shape[-1] * dtype.elements_per_item] if dtype.elements_per_item > 1 else list(shape)
        found[key] = (dtype.code, counts, content[region.offset_bytes : region.offset_bytes + region.n_bytes])
    return found


def filled(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Every bit pattern that the type allows, NaN among them."""
    n_bytes = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (n_bytes,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


# Reading what the official library writes.


@pytest.mark.parametrize("dtype", SHARED, ids=repr)
def test_every_dtype_of_an_official_file_is_described_as_torch_sees_it(tmp_path: Path, dtype: Any) -> None:
    torch_dtype = to_torch(dtype)
    tensors = {"matrix": filled(torch_dtype, (3, 4)), "empty": torch.empty(0, 5, dtype=torch_dtype)}
    if dtype.elements_per_item == 1:
        tensors["scalar"] = filled(torch_dtype, ())
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    contents = read_header(str(path))
    assert contents.n_file_bytes == len(content)
    assert {spec.key for spec in contents.specs} == tensors.keys()
    for key, found, shape, region, view in contents.specs:
        assert (found, shape, view) == (dtype, tuple(tensors[key].shape), None)
        expected = tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[region.offset_bytes : region.offset_bytes + region.n_bytes] == expected


def test_specs_are_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {
        name: {"dtype": "U8", "shape": [2], "data_offsets": [at, at + 2]}
        for name, at in {"a": 4, "b": 0, "c": 2}.items()
    }
    for separators in ((",", ":"), (", ", ": "), (" ,", " :")):
        contents = read(tmp_path, file_bytes(json.dumps(header, separators=separators), b"bbccaa"))
        assert [spec.key for spec in contents.specs] == ["b", "c", "a"]


def test_metadata_is_read_and_its_absence_is_an_empty_one(tmp_path: Path) -> None:
    notes = {"format": "pt", "quoted": '"} \\', "ünïcode": "\u2028"}
    for text in (json.dumps(notes), json.dumps(notes, ensure_ascii=False, separators=(",", ":"))):
        assert read(tmp_path, file_bytes(f'{{"__metadata__":{text},"a":{ENTRY}}}', b"ab")).metadata == notes
        assert read(tmp_path, file_bytes(f'{{"__metadata__":{text}}}')).metadata == notes
    assert read(tmp_path, file_bytes(f'{{"a":{ENTRY},"__metadata__":{{"x":"y"}}}}', b"ab")).metadata == {"x": "y"}
    assert read(tmp_path, file_bytes(f'{{"__metadata__":null,"a":{ENTRY}}}', b"ab")).metadata == {}
    assert read(tmp_path, file_bytes(f'{{"a":{ENTRY}}}', b"ab")).metadata == {}


ACCEPTED = {
    "no tensors": ("{}", b""),
    "padded with spaces": (f'{{"a":{ENTRY}}}   ', b"ab"),
    "padded with other whitespace": (f'{{"a":{ENTRY}}}\n\t ', b"ab"),
    "an unknown field": ('{"a":{"dtype":"U8","new":{"x":[1]},"shape":[2],"data_offsets":[0,2]}}', b"ab"),
    "an empty key": (f'{{"":{ENTRY}}}', b"ab"),
    "an escaped key": (f'{{"\\u0061\\ud83d\\ude00":{ENTRY}}}', b"ab"),
    "empty tensors between others": (
        '{"x":{"dtype":"F32","shape":[0,9],"data_offsets":[0,0]},"a":'
        + ENTRY
        + ',"y":{"dtype":"F32","shape":[0],"data_offsets":[2,2]}}',
        b"ab",
    ),
    "a field nested deeply": (f'{{"a":{{"x":{"[" * 125}{"]" * 125},{ENTRY[1:]}}}', b"ab"),
    "six-bit floats": ('{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}', b"abc"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_unusual_header_is_read_as_the_official_reader_does(tmp_path: Path, case: str) -> None:
    content = file_bytes(*ACCEPTED[case])
    expected = official(content)
    assert expected is not None
    assert as_official(read(tmp_path, content), content) == expected


# Refusing. Each: the header, the data, what is raised.


def entry(dtype: str = '"U8"', shape: str = "[2]", offsets: str = "[0,2]") -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


REFUSED: dict[str, tuple[str | bytes, bytes, type[FormatError]]] = {
    "nothing": ("", b"", HeaderError),
    "not JSON": ('{"a":', b"", HeaderError),
    "text after the object": (entry() + "\0", b"ab", HeaderError),
    "not an object": ("[]", b"", HeaderError),
    "not UTF-8": (b'{"\xff":' + ENTRY.encode() + b"}", b"ab", HeaderError),
    "a byte order mark": (b"\xef\xbb\xbf" + entry().encode(), b"ab", HeaderError),
    "UTF-16": ("{}".encode("utf-16-le"), b"", HeaderError),
    "NaN": (entry(shape="[NaN]"), b"ab", HeaderError),
    "an endless integer": (entry(shape=f"[{'9' * 5000}]"), b"ab", HeaderError),
    "a control character": (f'{{"a\n":{ENTRY}}}', b"ab", HeaderError),
    "half a character in a key": (f'{{"\\ud800":{ENTRY}}}', b"ab", HeaderError),
    "half a character in the metadata": (f'{{"__metadata__":{{"a":"\\udc00"}},"a":{ENTRY}}}', b"ab", HeaderError),
    "nested too deeply": ('{"a":' + "[" * 200_000, b"", HeaderError),
    "nested too deeply in the metadata": ('{"__metadata__":' + "[" * 200_000, b"", HeaderError),
    "metadata of numbers": (f'{{"__metadata__":{{"a":1}},"a":{ENTRY}}}', b"ab", HeaderError),
    "metadata that is a list": (f'{{"__metadata__":["a"],"a":{ENTRY}}}', b"ab", HeaderError),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', b"", HeaderError),
    "an entry that is a number": ('{"a":3}', b"", HeaderError),
    "unknown dtype": (entry('"F7"'), b"ab", UnknownDtypeError),
    "a dtype that only torch has": (entry('"C128"', "[1]", "[0,16]"), b"a" * 16, UnknownDtypeError),
    "a dtype that is a number": (entry("8"), b"ab", UnknownDtypeError),
    "no dtype": ('{"a":{"shape":[2],"data_offsets":[0,2]}}', b"ab", UnknownDtypeError),
    "no shape": ('{"a":{"dtype":"U8","data_offsets":[0,2]}}', b"ab", HeaderError),
    "no offsets": ('{"a":{"dtype":"U8","shape":[2]}}', b"ab", HeaderError),
    "a shape of true": (entry(shape="[true]", offsets="[0,1]"), b"a", HeaderError),
    "a shape of fractions": (entry(shape="[2.0]"), b"ab", HeaderError),
    "negative shape": (entry(shape="[-2,-1]"), b"ab", HeaderError),
    "a shape with a hole": (entry(shape="[2,,1]"), b"ab", HeaderError),
    "a shape beyond 64 bits": (entry(shape=f"[{2**62},{2**62}]"), b"ab", HeaderError),
    "a shape of minus zero": (entry(shape="[2,1]", offsets="[-0,2]"), b"ab", HeaderError),
    "a field beyond a double": (f'{{"a":{{"x":1e999,{ENTRY[1:]}}}', b"ab", HeaderError),
    "a field nested too deeply": (f'{{"a":{{"x":{"[" * 126}{"]" * 126},{ENTRY[1:]}}}', b"ab", HeaderError),
    "half a character in a field": (f'{{"a":{{"x":"\\udc00",{ENTRY[1:]}}}', b"ab", HeaderError),
    "a shape of a million dimensions": (entry(shape=f"[{'2,' * 1_000_000}2]"), b"ab", HeaderError),
    "a shape beyond 64 bits, with a zero": (entry(shape=f"[{2**62},{2**62},0]", offsets="[0,0]"), b"", HeaderError),
    "three offsets": (entry(offsets="[0,2,3]"), b"ab", HeaderError),
    "negative offsets": (entry(offsets="[-2,0]"), b"ab", HeaderError),
    "offsets of true": (entry(shape="[1]", offsets="[false,true]"), b"a", HeaderError),
    "offsets the wrong way round": (entry(offsets="[2,0]"), b"ab", HeaderError),
    "offsets with leading zeros": (entry(offsets="[00,02]"), b"ab", HeaderError),
    "a length that shape and dtype do not give": (entry(shape="[3]"), b"ab", HeaderError),
    "half a byte": (entry('"F4"', "[3]"), b"ab", HeaderError),
    "a four-bit scalar": (entry('"F4"', "[]", "[0,1]"), b"a", HeaderError),
    "a hole at the start": (entry(offsets="[1,3]"), b"abc", HeaderError),
    "a hole": (f'{{"a":{ENTRY},"b":{{"dtype":"U8","shape":[2],"data_offsets":[3,5]}}}}', b"abcde", HeaderError),
    "an overlap": (f'{{"a":{ENTRY},"b":{{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}}}', b"abc", HeaderError),
    "the same bytes twice": (f'{{"a":{ENTRY},"b":{ENTRY}}}', b"ab", HeaderError),
    "an empty tensor inside another": (
        f'{{"a":{ENTRY},"b":{{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}}}',
        b"ab",
        HeaderError,
    ),
    "data after the last tensor": (entry(), b"abc", HeaderError),
    "data that ends early": (entry(), b"a", TruncatedFileError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_broken_header_is_refused_as_the_official_reader_does(tmp_path: Path, case: str) -> None:
    header, data, error = REFUSED[case]
    content = file_bytes(header, data)
    assert official(content) is None
    with pytest.raises(error) as caught:
        read(tmp_path, content)
    assert type(caught.value) is error
    assert caught.value.file == str(tmp_path / "model.safetensors")
    assert len(str(caught.value)) < 1000


STRICTER = {
    "a key twice": (f'{{"a":{ENTRY},"a":{ENTRY}}}', b"ab"),
    "a field of the metadata twice": (f'{{"__metadata__":{{"a":"1","a":"2"}},"a":{ENTRY}}}', b"ab"),
    "whitespace before the brace": (f' {{"a":{ENTRY}}}', b"ab"),
    "an entry that is an array": ('{"a":["U8",[2],[0,2]]}', b"ab"),
    "odd rows of four bits, which torch cannot hold": (entry('"F4"', "[2,3]", "[0,3]"), b"abc"),
    "a shape that torch cannot hold": (entry(shape=f"[0,{2**62},{2**62}]", offsets="[0,0]"), b""),
}


@pytest.mark.parametrize("case", STRICTER)
def test_what_readers_could_take_in_two_ways_is_refused(tmp_path: Path, case: str) -> None:
    content = file_bytes(*STRICTER[case])
    assert official(content) is not None, "the docstring of the module promises more than it has to"
    with pytest.raises(HeaderError):
        read(tmp_path, content)


def test_duplicate_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeaderError) as caught:
        read(tmp_path, file_bytes(*STRICTER["a key twice"]))
    assert caught.value.key == "a"


@pytest.mark.parametrize("n_bytes", [0, 7])
def test_file_without_a_length_is_refused(tmp_path: Path, n_bytes: int) -> None:
    with pytest.raises(TruncatedFileError, match="too short"):
        read(tmp_path, b"1" * n_bytes)


def test_header_that_claims_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)
    with pytest.raises(HeaderError, match="longer than the format allows"):
        read_header(str(path))
    with pytest.raises(HeaderError, match="longer than the format allows"):
        read(tmp_path, struct.pack("<Q", 2**64 - 1) + b"{}")


def test_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TruncatedFileError, match="ends before its header"):
        read(tmp_path, struct.pack("<Q", 3) + b"{}")


def test_missing_file_folder_and_named_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        read_header(str(tmp_path / "absent"))
    with pytest.raises(UnreadableFileError):
        read_header(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableFileError):
        read_header(str(tmp_path / "pipe"))


# Differential tests on made-up headers.

counts = st.integers(0, 4)
tensors = st.tuples(st.sampled_from([*DTYPES, "F7", "u8"]), st.lists(counts, max_size=3))


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A file that is right in most ways, in any spelling, and wrong in some now and then."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    position = 0
    for key in draw(st.lists(st.text(max_size=4), max_size=5, unique=True)):
        code, shape = draw(tensors)
        n_bits = DTYPES[code].n_bits if code in DTYPES else 8
        for count in shape:
            n_bits *= count
        end = position + n_bits // 8
        shift_begin, shift_end = draw(st.sampled_from([(0, 0)] * 12 + [(1, 0), (0, 1), (-1, 0), (1, 1), (0, -1)]))
        offsets = [max(0, position + shift_begin), max(0, end + shift_end)]
        fields = [("dtype", code), ("shape", shape), ("data_offsets", offsets)]
        header[key] = dict(draw(st.permutations(fields)))
        position = offsets[1]
    if draw(st.booleans()):
        header = dict(draw(st.permutations(list(header.items()))))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")]))
    text = json.dumps(header, separators=separators, ensure_ascii=draw(st.booleans()))
    extra = draw(st.sampled_from([0] * 8 + [1, -1]))
    padding = draw(st.sampled_from(["", "    ", "\n"]))
    return file_bytes(text + padding, bytes(i % 251 for i in range(max(0, position + extra))))


def torch_can_hold(found: dict[str, tuple[str, list[int], bytes]]) -> bool:
    return all(shape and shape[-1] % 2 == 0 for code, shape, _ in found.values() if code == "F4")


@given(content=headers())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_made_up_header_is_taken_as_the_official_reader_takes_it(tmp_path: Path, content: bytes) -> None:
    expected = official(content)
    if expected is None or not torch_can_hold(expected):
        with pytest.raises(FormatError):
            read(tmp_path, content)
    else:
        assert as_official(read(tmp_path, content), content) == expected


GOOD = file_bytes(
    '{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[10,3],"data_offsets":[0,120]},'
    '"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[120,124]}}  ',
    bytes(124),
)


@given(
    at=st.integers(0, len(GOOD) - 125),
    removed=st.integers(0, 3),
    inserted=st.text('{}[]",:019\\ axu', max_size=3).map(str.encode),
    mends_length=st.booleans(),
)
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_header_never_passes_where_the_official_reader_refuses(
    tmp_path: Path, at: int, removed: int, inserted: bytes, mends_length: bool
) -> None:
    content = GOOD[:at] + inserted + GOOD[at + removed :]
    if mends_length and at >= 8:
        content = struct.pack("<Q", len(content) - 8 - 124) + content[8:]
    expected = official(content)
    try:
        found = as_official(read(tmp_path, content), content)
    except FormatError:
        return
    assert found == expected


# Writing.


def written(entries: list[tuple[str, Any, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> bytes:
    header, offsets = encode_header(entries, metadata)
    n_bytes = sum(dtype.itemsize * int(torch.Size(shape).numel()) for _, dtype, shape in entries)
    assert list(offsets.values()) == sorted(offsets.values())
    return header + bytes(n_bytes)


def test_data_starts_on_a_page_and_whole_pages_stay_on_pages(tmp_path: Path) -> None:
    entries = [
        ("small", DTYPES["U8"], (3,)),
        ("z.pages", DTYPES["F16"], (2048, 2)),
        ("double", DTYPES["F64"], (3,)),
        ("a.pages", DTYPES["U8"], (4096,)),
        ("b.single", DTYPES["F32"], (1,)),
        ("a.single", DTYPES["F32"], (5,)),
        ("empty", DTYPES["F32"], (0,)),
    ]
    contents = read(tmp_path, written(entries))
    offsets = {spec.key: spec.region.offset_bytes for spec in contents.specs}
    assert [*offsets] == ["z.pages", "a.pages", "double", "a.single", "b.single", "empty", "small"]
    assert offsets["z.pages"] == DATA_ALIGNMENT
    assert offsets["a.pages"] % DATA_ALIGNMENT == 0
    assert all(spec.region.offset_bytes % spec.dtype.itemsize == 0 for spec in contents.specs)


@pytest.mark.parametrize("n_tensors", [0, 1, 37, 38, 39, 40, 41, 500])
def test_header_is_padded_to_a_page_whatever_its_length(n_tensors: int) -> None:
    content = written([(f"tensor.{i:04d}", DTYPES["U8"], (1,)) for i in range(n_tensors)])
    assert (struct.unpack("<Q", content[:8])[0] + 8) % DATA_ALIGNMENT == 0
    found = official(content)
    assert found is not None
    assert len(found) == n_tensors


@pytest.mark.parametrize("dtype", SHARED, ids=repr)
def test_official_reader_reads_every_dtype(tmp_path: Path, dtype: Any) -> None:
    shapes: dict[str, tuple[int, ...]] = {"matrix": (3, 4), "empty": (0, 5)}
    if dtype.elements_per_item == 1:
        shapes["scalar"] = ()
    path = tmp_path / "model.safetensors"
    path.write_bytes(written([(key, dtype, shape) for key, shape in shapes.items()], {"note": "ü"}))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "ü"}
        for key, shape in shapes.items():
            assert tuple(file.get_tensor(key).shape) == shape
            assert file.get_tensor(key).dtype == to_torch(dtype)
    assert {spec.key: spec.shape for spec in read_header(str(path)).specs} == shapes


def test_metadata_defaults_to_the_one_transformers_asks_for(tmp_path: Path) -> None:
    assert read(tmp_path, written([])).metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ([("a", DTYPES["U8"], (1,)), ("a", DTYPES["U8"], (1,))], OptionError),
        ([("__metadata__", DTYPES["U8"], (1,))], OptionError),
        ([("\ud800", DTYPES["U8"], (1,))], OptionError),
        ([("a", DTYPES["C128"], (1,))], UnknownDtypeError),
        ([("a", DTYPES["F4"], ())], UnknownDtypeError),
        ([("k" * 1000 * 1000 + str(i), DTYPES["U8"], (1,)) for i in range(101)], OptionError),
    ],
    ids=["a key twice", "a reserved key", "half a character", "C128", "a four-bit scalar", "too long"],
)
def test_header_that_could_not_be_read_is_not_written(entries: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        encode_header(entries)
