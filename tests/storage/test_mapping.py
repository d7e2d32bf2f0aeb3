"""Mapped files, and tensors that stand on them."""

from __future__ import annotations

import gc
import os
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastload.dtypes import DTYPES, DType
from fastload.errors import ArchiveError, TruncatedFileError, UnreadableFileError
from fastload.formats.specs import Encoding, Region, StorageView, TensorSpec
from fastload.storage.mapping import MappedFile, is_mappable


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 64)
    return str(file)


def floats(path: str, offset: int = 0, n: int = 4, view: StorageView | None = None) -> TensorSpec:
    return TensorSpec("t", DTYPES["F32"], (n,), Region(path, offset, 4 * n), view)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def n_mappings_of(path: str) -> int:
    with open("/proc/self/maps") as maps:
        return sum(path in line for line in maps)


def test_an_aligned_tensor_is_a_view_of_the_mapping(path: str) -> None:
    file = MappedFile(path, 16384)
    a, b = file.tensor(floats(path, 256)), file.tensor(floats(path, 512))
    assert b.data_ptr() - a.data_ptr() == 256
    assert bytes_of(a) == bytes(range(16))


def test_a_tensors_storage_is_exactly_its_own(path: str) -> None:
    tensor = MappedFile(path, 16384).tensor(floats(path, 256))
    assert tensor.untyped_storage().nbytes() == 16


def test_a_misaligned_tensor_is_copied_with_the_same_bytes(path: str) -> None:
    spec = floats(path, 257)
    assert not is_mappable(spec)
    tensor = MappedFile(path, 16384).tensor(spec)
    assert tensor.data_ptr() % 4 == 0
    assert bytes_of(tensor) == bytes(range(1, 17))


@given(offset=st.integers(0, 16000), n=st.integers(0, 90))
def test_any_region_gives_the_files_bytes(tmp_path_factory: pytest.TempPathFactory, offset: int, n: int) -> None:
    file = tmp_path_factory.getbasetemp() / "any"
    content = bytes(range(256)) * 64
    if not file.exists():
        file.write_bytes(content)
    tensor = MappedFile(str(file), 16384).tensor(floats(str(file), offset, n))
    assert bytes_of(tensor) == content[offset : offset + 4 * n]


def test_writing_to_a_tensor_leaves_the_file_alone(path: str) -> None:
    before = Path(path).read_bytes()
    tensor = MappedFile(path, 16384).tensor(floats(path))
    tensor.fill_(1.5)
    assert tensor.tolist() == [1.5] * 4
    assert Path(path).read_bytes() == before


def test_specs_of_one_region_share_a_storage(path: str) -> None:
    file = MappedFile(path, 16384)
    whole = file.tensor(floats(path, 0, 8))
    part = file.tensor(TensorSpec("p", DTYPES["F32"], (2, 2), Region(path, 0, 32), StorageView(1, (1, 2))))
    assert part.untyped_storage()._cdata == whole.untyped_storage()._cdata
    whole.copy_(torch.arange(8.0))
    assert part.tolist() == [[1.0, 3.0], [2.0, 4.0]]


ALL_DTYPES = [dtype for dtype in DTYPES.values() if dtype.torch_name and hasattr(torch, dtype.torch_name)]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=repr)
def test_many_tensors_at_once_are_those_made_one_by_one(path: str, dtype: DType) -> None:
    shapes = [(2, 3), (), (0, 4), (4,), (1,) * 40, (1, 2, 0)]
    offsets = [0, 256, 512, 512, 1024, 16384]
    specs = [
        TensorSpec(str(at), dtype, shape, Region(path, at, torch.Size(shape).numel() * dtype.itemsize))
        for shape, at in zip(shapes, offsets, strict=True)
    ]
    specs.append(specs[0]._replace(region=specs[0].region._replace(offset_bytes=2049)))
    for made, spec in zip(MappedFile(path, 16384).tensors(specs), specs, strict=True):
        one = MappedFile(path, 16384).tensor(spec)
        assert (made.shape, made.dtype, made.stride()) == (one.shape, one.dtype, one.stride())
        assert bytes_of(made) == bytes_of(one)
        assert made.untyped_storage().nbytes() == spec.region.n_bytes


def test_many_tensors_at_once_share_what_they_stand_on_and_leave_the_file_alone(path: str) -> None:
    before = Path(path).read_bytes()
    part = TensorSpec("p", DTYPES["F32"], (2, 2), Region(path, 0, 32), StorageView(1, (1, 2)))
    whole, view, other = MappedFile(path, 16384).tensors([floats(path, 0, 8), part, floats(path, 64, 8)])
    gc.collect()
    whole.copy_(torch.arange(8.0))
    assert view.tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert view.untyped_storage()._cdata == whole.untyped_storage()._cdata != other.untyped_storage()._cdata
    assert n_mappings_of(path) == 1
    del whole, view, other
    gc.collect()
    assert n_mappings_of(path) == 0
    assert Path(path).read_bytes() == before


def test_tensors_outlive_the_file_object_and_the_mapping_ends_with_them(path: str) -> None:
    tensor = MappedFile(path, 16384).tensor(floats(path))
    view = tensor[1:]
    del tensor
    gc.collect()
    assert n_mappings_of(path) == 1
    assert bytes_of(view) == bytes(range(4, 16))
    del view
    gc.collect()
    assert n_mappings_of(path) == 0


def test_no_descriptor_is_left_open(path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        MappedFile(path, 16384).tensor(floats(path))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_cut_since_its_header_was_read_is_an_error(path: str) -> None:
    os.truncate(path, 100)
    with pytest.raises(TruncatedFileError, match="100 bytes"):
        MappedFile(path, 16384)


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="gone"):
        MappedFile(str(tmp_path / "gone"), 10)


def test_release_keeps_the_bytes_readable(path: str) -> None:
    file = MappedFile(path, 16384)
    spec = floats(path, 0, 4096)
    before = bytes_of(file.tensor(spec))
    file.release(spec.region)
    assert bytes_of(file.tensor(spec)) == before


def encoded(tmp_path: Path, raw: bytes, n_bytes: int, crc32: int | None = None, swap: int = 1) -> TensorSpec:
    deflate = zlib.compressobj(wbits=-15)
    packed = deflate.compress(raw) + deflate.flush()
    file = tmp_path / "packed"
    file.write_bytes(b"head" + packed)
    region = Region(str(file), 4, n_bytes, Encoding("deflate", len(packed), crc32, swap))
    return TensorSpec("t", DTYPES["F32"], (n_bytes // 4,), region)


def read(spec: TensorSpec) -> torch.Tensor:
    return MappedFile(spec.region.file, os.path.getsize(spec.region.file)).tensor(spec)


def test_a_compressed_entry_is_decoded_and_checked(tmp_path: Path) -> None:
    raw = torch.arange(1000.0).numpy().tobytes()
    assert bytes_of(read(encoded(tmp_path, raw, len(raw), zlib.crc32(raw)))) == raw


def test_big_endian_bytes_are_swapped(tmp_path: Path) -> None:
    raw = torch.arange(16.0).numpy().astype(">f4").tobytes()
    assert read(encoded(tmp_path, raw, len(raw), None, swap=4)).tolist() == list(range(16))


@pytest.mark.parametrize(
    ("raw", "claimed", "crc32"),
    [(b"x" * 40, 44, None), (b"x" * 48, 44, None), (b"x" * 44, 44, 1), (b"x" * 10_000_000, 44, None)],
    ids=["too short", "too long", "wrong checksum", "a bomb"],
)
def test_an_entry_that_lies_is_refused(tmp_path: Path, raw: bytes, claimed: int, crc32: int | None) -> None:
    with pytest.raises(ArchiveError, match="packed"):
        read(encoded(tmp_path, raw, claimed, crc32))


def test_damaged_compression_is_refused(tmp_path: Path) -> None:
    spec = encoded(tmp_path, b"y" * 44, 44)
    Path(spec.region.file).write_bytes(b"head" + b"\xff" * spec.region.encoding.n_bytes)  # type: ignore[union-attr]
    with pytest.raises(ArchiveError):
        read(spec)
