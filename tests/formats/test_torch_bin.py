"""The reader of torch's own files, against files that torch wrote and against torch's own reading of them."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import tarfile
import types
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastload.dtypes import to_torch
from fastload.errors import (
    ArchiveError,
    FormatError,
    TruncatedFileError,
    UnknownDtypeError,
    UnreadableFileError,
)
from fastload.formats.specs import TensorSpec
from fastload.formats.torch_bin import read_bin

TORCH_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)),
]


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits at all, so that NaN payloads and denormals count; only 0 and 1 for bool."""
    n_bytes = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (n_bytes,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def materialise(spec: TensorSpec) -> torch.Tensor:
    """The tensor a spec describes, made the plain way."""
    region = spec.region
    encoding = region.encoding
    with open(region.file, "rb") as file:
        file.seek(region.offset_bytes)
        raw = file.read(encoding.n_bytes if encoding else region.n_bytes)
    if encoding and encoding.compression == "deflate":
        raw = zlib.decompress(raw, -zlib.MAX_WBITS)
        assert zlib.crc32(raw) == encoding.crc32
    if encoding and encoding.swap_bytes > 1:
        unit = encoding.swap_bytes
        raw = b"".join(raw[i : i + unit][::-1] for i in range(0, len(raw), unit))
    assert len(raw) == region.n_bytes
    dtype = to_torch(spec.dtype)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    flat = flat.view(dtype)
    if spec.view is None:
        return flat.reshape(spec.shape)
    return flat.as_strided(spec.shape, spec.view.stride, spec.view.offset)


def as_bytes(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    # element by element through as_strided of bytes, since not every type can be copied
    tensor = tensor.detach()
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    size = tensor.element_size()
    strides = [step * size for step in tensor.stride()] + [1]
    raw = storage.as_strided([*tensor.shape, size], strides, tensor.storage_offset() * size).contiguous()
    return tensor.dtype, tuple(tensor.shape), bytes(raw.flatten().tolist())


def check(path: Path, expected: dict[str, torch.Tensor] | None = None) -> dict[str, TensorSpec]:
    """The file reads as torch reads it: same names in the same order, same types, shapes and bytes."""
    if expected is None:
        expected = torch.load(path, weights_only=True)
    contents = read_bin(str(path))
    assert contents.n_file_bytes == path.stat().st_size
    assert contents.metadata == {}
    assert [spec.key for spec in contents.specs] == list(expected)
    for spec in contents.specs:
        assert as_bytes(materialise(spec)) == as_bytes(expected[spec.key]), spec
    return {spec.key: spec for spec in contents.specs}


def save(obj: object, path: Path, **options: Any) -> Path:
    torch.save(obj, path, **options)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def test_torch_is_not_imported() -> None:
    code = "import sys, fastload.formats.torch_bin; assert not {'torch', 'numpy', 'pickle'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what torch.save writes ----


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_reads_bit_exact(path: Path, dtype: torch.dtype, zipped: bool) -> None:
    state = {"matrix": random_tensor(dtype, 3, 5), "scalar": random_tensor(dtype), "empty": random_tensor(dtype, 0, 4)}
    save(state, path, _use_new_zipfile_serialization=zipped)
    # torch writes untyped storages (the types after bfloat16) into legacy files, and then cannot read them itself
    specs = check(path, None if zipped else state)
    assert all(spec.view is None and spec.region.encoding is None for spec in specs.values())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_pickle_protocol_reads(path: Path, protocol: int, zipped: bool) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    state["big"] = torch.zeros(70_000)
    # torch reads its own files safely in protocol 2 only
    save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    check(path, None if protocol == 2 else dict(state))


def test_many_tensors_read_in_order(path: Path) -> None:
    state = {f"layers.{i}.w" * (1 + i % 30): torch.full((i % 5, 1 + i % 3), i) for i in range(2_500)}
    check(save(state, path))


def test_unusual_names_read(path: Path) -> None:
    names = ["", "ключ", "a" * 300, "X\x01\0\0\0aq\x01h\x02((", "\ud800", "tq\x05Rq\x06."]
    check(save({name: torch.ones(2) for name in names}, path))


def test_names_that_look_like_opcodes_do_not_confuse_shared_memo_entries(path: Path) -> None:
    shared = torch.arange(6)
    state = {f"q{i}": shared[i:] for i in range(4)} | {"0": shared, "1": shared}
    state |= {f"n{i}": torch.full((2,), i) for i in range(400)} | {"again": shared, "n3 again": shared[2:4]}
    check(save(state, path))


def test_state_dict_of_a_module_carries_metadata_that_is_ignored(path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    assert state._metadata  # type: ignore[attr-defined]
    check(save(state, path))


def test_parameters_read_as_tensors(path: Path) -> None:
    with_attribute = torch.nn.Parameter(torch.randn(4))
    with_attribute.note = "x"  # type: ignore[attr-defined]
    tensor_with_attribute = torch.randn(3)
    tensor_with_attribute.note = [1, 2]  # type: ignore[attr-defined]
    state = {
        "first": torch.nn.Parameter(torch.randn(3, 3)),
        "second": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "with attribute": with_attribute,
        "tensor with attribute": tensor_with_attribute,
        "buffer": torch.nn.Buffer(torch.randn(2)),
    } | {f"p{i}": torch.nn.Parameter(torch.randn(2)) for i in range(300)}
    check(save(state, path), {name: value.data for name, value in state.items()})


def test_contiguous_tensor_on_its_own_storage_needs_no_view(path: Path) -> None:
    specs = check(save({"a": torch.randn(3, 1, 4), "b": torch.randn(1, 7)[:, :]}, path))
    assert specs["a"].view is None
    assert specs["b"].view is None


def test_views_of_one_storage_have_equal_regions(path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "base": base,
        "row": base[2],
        "column": base[:, 1],
        "transposed": base.T,
        "steps": base[::2, ::3],
        "expanded": base[0, :1].expand(5, 3),
        "none of it": base[:0],
        "element": base[3, 5],
        "same again": base,
    }
    specs = check(save(state, path))
    assert len({spec.region for spec in specs.values()}) == 1
    assert specs["base"].view is None
    assert specs["row"].view is not None
    assert specs["row"].view.offset == 12
    assert specs["transposed"].view is not None
    assert specs["transposed"].view.stride == (1, 6)


def test_types_that_torch_writes_as_untyped_storage_can_share_it(path: Path) -> None:
    base = random_tensor(torch.uint8, 64).view(torch.uint16)
    check(save({"all": base, "half": base[16:], "wide": base.view(torch.uint32)[3:]}, path))


@pytest.mark.parametrize(
    "wrap", [lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}, lambda s: {"module": s}]
)
def test_nested_state_dict_is_found(path: Path, wrap: Callable[[Any], Any]) -> None:
    state = OrderedDict(torch.nn.Linear(2, 3).state_dict())
    check(save(wrap(state), path), dict(state))


def test_what_is_not_a_tensor_is_named(path: Path) -> None:
    weight = torch.randn(2, 2)
    others = {
        "step": 12,
        "big": 2**70,
        "rate": 0.5,
        "text": "x",
        "raw": b"\0\1",
        "array": bytearray(b"ab"),
        "none": None,
        "list": [1, [2, (3, True)]],
        "nested": {"a": {"b": {1: 2, 0.5: None}}},
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "complex": 1j,
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "layout": torch.strided,
        "optimizer": {"betas": (0.9, 0.99), "moments": [torch.randn(3)]},
        7: "a number for a name",
    }
    for protocol in (2, 4):
        others.pop("frozen", None) if protocol == 2 else None
        check(save({**others, "weight": weight}, path, pickle_protocol=protocol), {"weight": weight})
        assert read_bin(str(path)).others == tuple(key for key in others if isinstance(key, str))


def test_what_stands_beside_a_nested_state_dict_is_not_of_it(path: Path) -> None:
    state = {"weight": torch.randn(2), "inner": "x"}
    assert read_bin(str(save({"state_dict": state, "epoch": 3}, path))).others == ("inner",)


def test_module_without_parameters_is_an_empty_state_dict(path: Path) -> None:
    assert read_bin(str(save(torch.nn.ReLU().state_dict(), path))).specs == ()


def test_storage_over_two_gigabytes_keeps_its_size(path: Path) -> None:
    with torch.serialization.skip_data():
        big = torch.empty(3 << 30, dtype=torch.uint8)
        save({"big": big, "tail": big[-3:]}, path)
    big_spec, tail = read_bin(str(path)).specs
    assert (big_spec.region.n_bytes, big_spec.view) == (3 << 30, None)
    assert tail.view is not None
    assert tail.view.offset == (3 << 30) - 3


def test_zip64_directory_of_more_than_65535_entries_reads(path: Path) -> None:
    save({"a": torch.arange(5)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(66_000):
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/extra/{i}"), b"")
    check(path)


def test_archive_without_checksums_reads(path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save({"a": torch.randn(3)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    check(path)


def rezip(
    path: Path, change: Callable[[str, bytes], bytes] = lambda _, data: data, method: int = zipfile.ZIP_DEFLATED
) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))


@pytest.mark.parametrize("streamed", [False, True])
def test_compressed_entries_read(path: Path, streamed: bool) -> None:
    state = {"a": torch.zeros(1000), "b": torch.randn(3).half(), "none": torch.empty(0), "part": torch.arange(99)[3:9]}
    save(state, path)
    if streamed:
        # Written into a pipe: the sizes follow the data instead of preceding it.
        with zipfile.ZipFile(path) as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
        with open(path, "wb") as file:
            pipe = types.SimpleNamespace(write=file.write, flush=file.flush)
            with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[call-overload]
                for name, data in entries:
                    archive.writestr(name, data)
    else:
        rezip(path)
    specs = check(path, state)
    encoding = specs["a"].region.encoding
    assert encoding is not None
    assert encoding.compression == "deflate"
    assert encoding.n_bytes < 4000
    assert specs["none"].region.encoding is None


def swapped(name: str, data: bytes, units: dict[str, int]) -> bytes:
    if name.endswith("/byteorder"):
        return b"big"
    unit = units.get(name.rpartition("/data/")[2], 1) if "/data/" in name else 1
    return b"".join(data[i : i + unit][::-1] for i in range(0, len(data), unit))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_big_endian_archive_reads(path: Path, method: int) -> None:
    dtypes = [d for d in TORCH_DTYPES if d not in (torch.uint16, torch.uint32, torch.uint64)]
    state = {str(dtype): random_tensor(dtype, 4, 3) for dtype in dtypes}
    state["part"] = state["torch.float32"][1:]
    save(state, path)
    units = {str(i): t.element_size() // (2 if t.is_complex() else 1) for i, t in enumerate(state.values())}
    rezip(path, lambda name, data: swapped(name, data, units), method)
    specs = check(path, state)
    torch_reads = torch.load(path, weights_only=True)
    for name, tensor in state.items():
        assert as_bytes(torch_reads[name]) == as_bytes(tensor)
    encoding = specs["torch.complex64"].region.encoding
    assert encoding is not None
    assert encoding.swap_bytes == 4
    assert specs["part"].region == specs["torch.float32"].region
    assert (specs["torch.uint8"].region.encoding is None) == (method == zipfile.ZIP_STORED)


def test_big_endian_types_in_untyped_storages_are_swapped_by_their_own_width(path: Path) -> None:
    state = {"a": random_tensor(torch.uint16, 5), "b": random_tensor(torch.uint64, 5)}
    save(state, path)
    rezip(path, lambda name, data: swapped(name, data, {"0": 2, "1": 8}), zipfile.ZIP_STORED)
    check(path, state)


def test_big_endian_storage_of_two_widths_is_refused(path: Path) -> None:
    base = random_tensor(torch.uint16, 8)
    save({"narrow": base, "wide": base.view(torch.uint32)}, path)
    rezip(path, lambda name, data: swapped(name, data, {"0": 2}), zipfile.ZIP_STORED)
    with pytest.raises(FormatError, match="wide"):
        read_bin(str(path))


# ---- older formats ----


def test_legacy_file_with_shared_storages_reads(path: Path) -> None:
    base = torch.randn(6, 4)
    state = OrderedDict(base=base, row=base[1], turned=base.T, half=torch.randn(3).half(), scalar=torch.tensor(2))
    state |= {f"w{i}": torch.randn(i % 7) for i in range(500)}
    specs = check(save(state, path, _use_new_zipfile_serialization=False))
    assert specs["row"].region == specs["base"].region


def legacy_file(path: Path, obj: object, keys: list[str], storages: list[bytes], *, little_endian: bool = True) -> Path:
    info = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    raw = b"".join(pickle.dumps(item, protocol=2) for item in (0x1950A86A20F9469CFC6C, 1001, info))
    path.write_bytes(raw + bytes_of(obj) + pickle.dumps(keys, protocol=2) + b"".join(storages))
    return path


class Saved:
    """Pickles as a persistent id."""

    def __init__(self, saved_id: object) -> None:
        self.saved_id = saved_id


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def bytes_of(obj: object) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return value.saved_id if isinstance(value, Saved) else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(obj)
    return stream.getvalue()


def test_legacy_parts_of_storages_read(path: Path) -> None:
    data = torch.arange(10, dtype=torch.float32)
    whole = Saved(("storage", torch.FloatStorage, "7", "cpu", 10, None))
    part = Saved(("storage", torch.FloatStorage, "7", "cuda:0", 10, ("8", 4, 6)))
    rebuild = torch._utils._rebuild_tensor
    state = {"whole": Call(rebuild, whole, 0, (2, 5), (5, 1)), "part": Call(rebuild, part, 1, (3,), (2,))}
    legacy_file(path, state, ["7"], [struct.pack("<q", 10) + data.numpy().tobytes()])
    check(path, {"whole": data.reshape(2, 5), "part": data[5:10:2]})


def test_legacy_data_is_little_endian_whoever_wrote_it(path: Path) -> None:
    data = torch.arange(3, dtype=torch.int32)
    storage = Saved(("storage", torch.IntStorage, "0", "cpu", 3, None))
    state = {"a": Call(torch._utils._rebuild_tensor_v2, storage, 0, (3,), (1,), False, OrderedDict())}
    raw = [struct.pack("<q", 3) + data.numpy().tobytes()]
    check(legacy_file(path, state, ["0"], raw, little_endian=False), {"a": data})
    assert torch.load(path, weights_only=True)["a"].tolist() == [0, 1, 2]


def test_legacy_pickle_larger_than_one_read_is_read_whole(path: Path) -> None:
    state = {f"some.rather.long.name.of.a.tensor.{i}": torch.full((3,), i) for i in range(3_000)}
    check(save(state, path, _use_new_zipfile_serialization=False))


def test_legacy_storage_of_another_size_than_its_pickle_says_is_refused(path: Path) -> None:
    storage = Saved(("storage", torch.IntStorage, "0", "cpu", 3, None))
    state = {"a": Call(torch._utils._rebuild_tensor, storage, 0, (3,), (1,))}
    legacy_file(path, state, ["0"], [struct.pack("<q", 2) + bytes(12)])
    with pytest.raises(ArchiveError, match="size"):
        read_bin(str(path))


def test_legacy_storage_that_is_not_listed_is_refused(path: Path) -> None:
    storage = Saved(("storage", torch.IntStorage, "0", "cpu", 3, None))
    legacy_file(path, {"a": Call(torch._utils._rebuild_tensor, storage, 0, (3,), (1,))}, [], [])
    with pytest.raises(ArchiveError, match="list of storages"):
        read_bin(str(path))


def tar_file(path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write what torch 0.1 wrote: numbered storages and tensors, and a pickle that names tensors by number."""
    storages, tensors = io.BytesIO(), io.BytesIO()
    roots = {t.untyped_storage().data_ptr(): t for t in state.values()}
    pickle.dump(len(roots), storages, protocol=2)
    for pointer, tensor in roots.items():
        kind = getattr(torch, tensor._typed_storage()._pickle_storage_type())
        pickle.dump((pointer, "cpu", kind), storages, protocol=2)
        raw = bytes(tensor.untyped_storage().tolist())
        storages.write(struct.pack("<q", len(raw) // tensor.element_size()) + raw)
    first = next(iter(roots))
    pickle.dump([(1, first, 2, 4)], storages, protocol=2)
    pickle.dump(len(state) + 1, tensors, protocol=2)
    for number, tensor in enumerate(state.values(), 100):
        pickle.dump((number, tensor.untyped_storage().data_ptr(), torch.FloatTensor), tensors, protocol=2)
        n = tensor.dim()
        tensors.write(struct.pack(f"<ii{n}q{n}qq", n, 0, *tensor.shape, *tensor.stride(), tensor.storage_offset()))
    pickle.dump((99, 1, torch.FloatTensor), tensors, protocol=2)
    tensors.write(struct.pack("<iiqqq", 1, 0, 2, 1, 1))
    named = {name: Saved(number) for number, name in enumerate(state, 100)} | {"part": Saved(99)}
    members = {"sys_info": pickle.dumps({}, 2), "pickle": bytes_of(OrderedDict(named))}
    members |= {"tensors": tensors.getvalue(), "storages": storages.getvalue()}
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1234567.25  # type: ignore[assignment]
            archive.addfile(member, io.BytesIO(data))
    return state | {"part": next(iter(state.values())).flatten()[3:5]}


def test_tar_file_reads(path: Path) -> None:
    base = torch.randn(4, 5)
    state = {"base": base, "turned": base.T[1:], "long": torch.arange(7), "scalar": torch.tensor(3.5)}
    expected = tar_file(path, state)
    specs = check(path, expected)
    assert specs["turned"].region == specs["base"].region
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and tarfile each warn about what torch does here
        torch_reads = torch.load(path, weights_only=False)
    for name, tensor in expected.items():
        assert as_bytes(torch_reads[name]) == as_bytes(tensor)


def test_tar_of_something_else_is_refused(path: Path) -> None:
    with tarfile.open(path, "w:") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    with pytest.raises(ArchiveError, match="torch did not write"):
        read_bin(str(path))


def test_tar_with_a_link_is_refused(path: Path) -> None:
    member = tarfile.TarInfo("storages")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(path, "w:") as archive:
        archive.addfile(member)
    with pytest.raises(ArchiveError, match="not a plain file"):
        read_bin(str(path))


# ---- what cannot be read, and says why ----


def test_missing_file_is_unreadable(path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="No such file"):
        read_bin(str(path))


def test_folder_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="not a regular file"):
        read_bin(str(tmp_path))


def test_file_without_permission_is_unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save({"a": torch.ones(1)}, path)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fastload.formats.torch_source.os.open", refuse)
    with pytest.raises(UnreadableFileError, match="Permission denied"):
        read_bin(str(path))


def test_empty_file_is_truncated(path: Path) -> None:
    path.touch()
    with pytest.raises(TruncatedFileError):
        read_bin(str(path))


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"\x80\x02K\x01.", b"\0" * 99]
)
def test_file_of_another_kind_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(FormatError, match="not a file that torch"):
        read_bin(str(path))


def test_zip_of_another_kind_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(ArchiveError, match="not one that torch"):
        read_bin(str(path))


def test_torchscript_program_is_refused(path: Path) -> None:
    save({"a": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/constants.pkl", b"")
    with pytest.raises(FormatError, match="TorchScript"):
        read_bin(str(path))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugated"),
    ],
)
def test_tensor_without_plain_bytes_is_refused_by_name(path: Path, make: Callable[[], torch.Tensor], what: str) -> None:
    save({"good": torch.ones(1), "layer.bad": make()}, path)
    with pytest.raises(FormatError, match=what) as caught:
        read_bin(str(path))
    assert caught.value.key == "layer.bad"
    assert caught.value.file == str(path)
    assert caught.value.fix


def test_unsupported_tensors_away_from_the_weights_do_not_matter(path: Path) -> None:
    weight = torch.randn(2)
    check(save({"state_dict": {"w": weight}, "extra": {"s": torch.ones(2, 2).to_sparse()}}, path), {"w": weight})


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_dtype_that_no_format_holds_is_refused_by_name(path: Path) -> None:
    save({"half": torch.zeros(2, dtype=torch.complex32)}, path)
    with pytest.raises(UnknownDtypeError, match="complex32") as caught:
        read_bin(str(path))
    assert caught.value.key == "half"


@pytest.mark.parametrize(
    "obj", [torch.ones(2), [torch.ones(2)], {"optimizer": {"lr": 1}}, 3, {"deep": {"er": torch.ones(1)}}]
)
def test_file_without_a_state_dict_says_what_it_holds(path: Path, obj: object) -> None:
    save(obj, path)
    with pytest.raises(FormatError, match="no state dict") as caught:
        read_bin(str(path))
    assert caught.value.found
    assert caught.value.fix


def test_tensor_whose_name_is_no_string_is_refused(path: Path) -> None:
    save({3: torch.ones(1)}, path)
    with pytest.raises(FormatError, match="not a string"):
        read_bin(str(path))


# ---- any strides, any shape ----


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(TORCH_DTYPES))
    n = draw(st.integers(0, 40))
    base = random_tensor(dtype, n)
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    stride = draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    if reach > n:
        return base
    return base.as_strided(shape, stride, draw(st.integers(0, n - reach)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(tensors(), min_size=1, max_size=6),
    protocol=st.sampled_from([2, 2, 4]),
    zipped=st.booleans(),
)
def test_any_layout_reads_as_torch_reads_it(
    tmp_path: Path, values: list[torch.Tensor], protocol: int, zipped: bool
) -> None:
    state = {f"t{i}": value for i, value in enumerate(values)}
    path = tmp_path / "any.bin"
    save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    check(path, state)
