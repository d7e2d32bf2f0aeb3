"""Files made to do harm: each is refused with an error that says why, quickly, and without side effects."""

from __future__ import annotations

import io
import pickle
import random
import resource
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastload.errors import ArchiveError, FastloadError, FormatError, TruncatedFileError, UnsafePickleError
from fastload.formats.torch_bin import read_bin
from fastload.formats.torch_pickle import PickleEndsEarlyError, load_pickle
from fastload.formats.torch_stubs import StorageStub

HEAD = b"\x80\x02"
ORDERED_DICT = b"ccollections\nOrderedDict\n"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def storage_id(n_elements: int, key: str = "0", kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(n_elements) + b"tQ"


def tensor(shape: bytes, stride: bytes, offset: int = 0, n_elements: int = 4, key: str = "0") -> bytes:
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage_id(n_elements, key) + number(offset) + shape + stride
    return call + b"\x89" + ORDERED_DICT + b")RtR"


def vector(n: int, step: int = 1, offset: int = 0, n_elements: int = 4) -> bytes:
    return tensor(number(n) + b"\x85", number(step) + b"\x85", offset, n_elements)


def archive(path: Path, data_pkl: bytes, method: int = zipfile.ZIP_STORED, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", data_pkl)
        for key, data in (storages or {"_0": bytes(16)}).items():
            file.writestr(f"archive/data/{key[1:]}", data)
        file.writestr("archive/version", "3\n")
    return path


def state(value: bytes) -> bytes:
    """A pickle of {"w": value}."""
    return HEAD + b"}" + text("w") + value + b"s."


@contextmanager
def quick_and_small(seconds: float = 1.0, n_bytes: int = 64 << 20) -> Iterator[None]:
    """Fails where the block takes long or the process has grown much."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < n_bytes


def refuse(
    path: Path, data_pkl: bytes, error: type[FastloadError] = FormatError, match: str | None = None
) -> FastloadError:
    """Both the zip reader and the legacy reader refuse this pickle."""
    archive(path, data_pkl)
    with quick_and_small(), pytest.raises(error, match=match) as caught:
        read_bin(str(path))
    assert caught.value.file == str(path)
    legacy = path.with_suffix(".legacy")
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    legacy.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts) + data_pkl)
    with quick_and_small(), pytest.raises(FormatError):
        read_bin(str(legacy))
    return caught.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def test_the_building_blocks_of_these_tests_make_a_valid_file(path: Path) -> None:
    (spec,) = read_bin(str(archive(path, state(vector(4))))).specs
    assert (spec.key, spec.shape, spec.view) == ("w", (4,), None)
    assert torch.load(path, weights_only=True)["w"].tolist() == [0, 0, 0, 0]


# ---- code ----


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "posix.system", "nt.system", "subprocess.Popen", "sys.exit", "socket.socket"),
        *("builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__", "builtins.open"),
        *("builtins.type", "builtins.dict", "builtins.list", "builtins.map", "__builtin__.eval"),
        *("torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.jit._load_for_lite_interpreter"),
        *("torch.tensor", "torch.empty", "torch.from_file", "torch.UntypedStorage.from_file"),
        *("torch._utils._rebuild_wrapper_subclass", "torch._utils._rebuild_device_tensor_from_numpy"),
        *("torch._utils._import_dotted_name", "torch.storage._load_from_bytes", "torch.nn.Linear"),
        *("pickle.loads", "_pickle.loads", "marshal.loads", "types.CodeType", "types.FunctionType"),
        *("numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy.load"),
        *("codecs.decode", "operator.attrgetter", "functools.partial", "copyreg._reconstructor"),
        *("collections.defaultdict", "collections.namedtuple", "fastload.formats.torch_bin.read_bin"),
    ],
)
def test_call_of_a_name_off_the_list_is_refused(path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    call = f"c{module}\n{function}\n".encode() + b"(" + text("echo harm") + b"tR"
    error = refuse(path, state(call), UnsafePickleError, "code or an object")
    assert error.found == name
    assert error.key == "w"
    assert error.fix


def test_call_is_not_made(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "made"
    refuse(path, HEAD + b"cos\nmkdir\n" + text(str(victim)) + b"\x85R.", UnsafePickleError, "os.mkdir")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "os.system"),
        ("torch", "_utils._rebuild_tensor_v2"),
        ("torch._utils", "__builtins__"),
        ("torch._utils", "__builtins__.eval"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_tensor_v2.__call__"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "_sys.modules"),
        ("torch", "FloatStorage.from_buffer"),
        ("torch.storage", "io.open"),
        ("torch._utils._rebuild_tensor_v2", ""),
        ("", "torch"),
    ],
)
@pytest.mark.parametrize("by_stack", [False, True], ids=["GLOBAL", "STACK_GLOBAL"])
def test_attributes_of_allowed_names_are_out_of_reach(path: Path, module: str, name: str, by_stack: bool) -> None:
    fetch = text(module) + text(name) + b"\x93" if by_stack else f"c{module}\n{name}\n".encode()
    refuse(path, state(fetch), UnsafePickleError, "code or an object")


def test_global_whose_name_is_no_string_is_refused(path: Path) -> None:
    refuse(path, state(text("torch") + b"(" + b"t\x93"), UnsafePickleError, "without a name")


def test_global_with_an_endless_name_is_refused(path: Path) -> None:
    refuse(path, state(b"c" + b"a" * 100_000), UnsafePickleError, "very long name")


def test_pickle_inside_a_pickle_is_not_opened(path: Path) -> None:
    inner = text(pickle.dumps(1, protocol=0).decode())
    refuse(path, state(b"c_pickle\nloads\n" + inner + b"\x85R"), UnsafePickleError, "_pickle.loads")


@pytest.mark.parametrize(
    ("opcode", "example_use"),
    [
        ("INST", b"(" + b"ios\nsystem\n"),
        ("OBJ", b"(" + ORDERED_DICT + b"o"),
        ("NEWOBJ", ORDERED_DICT + b")\x81"),
        ("NEWOBJ_EX", ORDERED_DICT + b")}\x92"),
        ("EXT1", b"\x82\x01"),
        ("EXT2", b"\x83\x01\0"),
        ("EXT4", b"\x84\x01\0\0\0"),
        ("DUP", b"2"),
        ("POP", b"0"),
        ("POP_MARK", b"(1"),
        ("PERSID", b"P0\n"),
        ("PUT", b"p0\n"),
        ("GET", b"g0\n"),
        ("STRING", b"S'a'\n"),
        ("UNICODE", b"Va\n"),
        ("FLOAT", b"F1.0\n"),
        ("LIST", b"(l"),
        ("DICT", b"(d"),
        ("LONG4", b"\x8b\x04\0\0\0\x01\0\0\0"),
        ("BYTEARRAY8", b"\x96\xff\xff\xff\xff\xff\0\0\0"),
        ("NEXT_BUFFER", b"\x97"),
        ("READONLY_BUFFER", b"\x98"),
        ("nothing", b"\xff"),
    ],
)
def test_opcode_that_no_state_dict_needs_is_refused(path: Path, opcode: str, example_use: bytes) -> None:
    refuse(path, state(example_use), UnsafePickleError)


@pytest.mark.parametrize(
    "target",
    [
        vector(4),
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        ORDERED_DICT,
        b"ctorch\nFloatStorage\n",
        b"ctorch\nfloat32\n",
        b"ctorch\nTensor\n",
        storage_id(4),
        *(b"}", b"]", b")", b"N", b"K\x01", text("x")),
    ],
)
def test_state_is_set_on_nothing_but_ordered_dicts(path: Path, target: bytes) -> None:
    attributes = b"}" + text("__class__") + b"Nsb"
    refuse(path, state(target + attributes), UnsafePickleError, "state of something")


def test_state_set_on_an_ordered_dict_changes_nothing(path: Path) -> None:
    attributes = b"}(" + text("items") + b"N" + text("_metadata") + b"N" + text("__class__") + b"Nu"
    data = HEAD + ORDERED_DICT + b")R" + text("w") + vector(4) + b"s" + attributes + b"b."
    (spec,) = read_bin(str(archive(path, data))).specs
    assert spec.key == "w"


@pytest.mark.parametrize(
    "called", [ORDERED_DICT + b")R", b"N", text("eval"), b"ctorch\nFloatStorage\n", vector(4), b"ctorch\nTensor\n"]
)
def test_only_functions_on_the_list_can_be_called(path: Path, called: bytes) -> None:
    refuse(path, state(called + b")R"), UnsafePickleError, "cannot be called")


@pytest.mark.parametrize(
    "arguments",
    [
        b")",
        b"(NNNNNNt",
        b"(" + storage_id(4) + b"K\0)N\x89Nt",
        b"(" + storage_id(4) + b"K\0" + text("ab") + b")\x89Nt",
        b"(" + storage_id(4) + b"N))\x89Nt",
        b"(" + storage_id(4) + number(-1) + b"))\x89Nt",
        b"(" + storage_id(4) + b"K\0" + number(-4) + b"\x85K\x01\x85\x89Nt",
        b"(" + storage_id(4) + b"K\0" + number(2**90) + b"\x85K\0\x85\x89Nt",
        b"(" + storage_id(4) + b"K\0K\x04K\x01\x86K\x01\x85\x89Nt",
        b"(" + b"K\x01" * 100 + b"t",
        b"N",
        b"]",
    ],
)
def test_odd_arguments_of_the_rebuild_function_are_refused(path: Path, arguments: bytes) -> None:
    refuse(path, state(b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"))


@pytest.mark.parametrize(
    "saved_id",
    [b"N", b")", b"K\x07", text("storage"), b"(" + text("module") + b"NNNNt", b"(" + text("storage") + b"NNNNt"],
)
def test_odd_storage_ids_are_refused(path: Path, saved_id: bytes) -> None:
    refuse(path, state(saved_id + b"Q"))


# ---- memory and time ----


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\xff", b"r\xff\xff\xff\x7f"])
def test_enormous_memo_index_costs_nothing(path: Path, put: bytes) -> None:
    with quick_and_small():
        (spec,) = read_bin(str(archive(path, state(vector(4) + put)))).specs
    assert spec.key == "w"


def test_memo_entry_that_is_not_there_is_refused(path: Path) -> None:
    refuse(path, state(b"j\xff\xff\xff\xff"), FormatError, "damaged")


def test_memo_entry_written_twice_is_refused(path: Path) -> None:
    refuse(path, state(b"Nq\x01q\x01"), UnsafePickleError, "twice")


@pytest.mark.parametrize(
    "claim",
    [
        b"X\xff\xff\xff\xff",
        b"B\xff\xff\xff\xff",
        b"T\xff\xff\xff\xff",
        b"\x8d" + b"\xff" * 8,
        b"\x8e\0\0\0\0\0\0\0\x40",
        b"\x8a\xff",
    ],
)
def test_string_longer_than_the_file_costs_nothing(path: Path, claim: bytes) -> None:
    refuse(path, state(claim + b"a" * 100), TruncatedFileError)


def test_frame_longer_than_the_file_costs_nothing(path: Path) -> None:
    archive(path, b"\x80\x04\x95" + b"\xff" * 8 + state(vector(4))[2:])
    with quick_and_small():
        assert len(read_bin(str(path)).specs) == 1


@pytest.mark.parametrize("opcode", [b"(", b"](", b"}"])
def test_deep_nesting_by_marks_is_refused(path: Path, opcode: bytes) -> None:
    refuse(path, HEAD + opcode * 300_000)


@pytest.mark.parametrize("nest", [b"\x85" * 300_000, b"]" * 200_000 + b"a" * 200_000], ids=["tuples", "lists"])
def test_deep_nesting_of_a_value_is_passed_over(path: Path, nest: bytes) -> None:
    data = HEAD + b"}(" + text("deep") + b"N" + nest + text("w") + vector(4) + b"u."
    with quick_and_small(n_bytes=256 << 20):
        outcome = outcome_of(archive(path, data))
    assert outcome == ["w"] or isinstance(outcome, FormatError)


def doubled(levels: int) -> bytes:
    """A tuple of two references to a tuple of two references ...: small in memory, endless to walk or to hash."""
    data = b")q\0"
    for level in range(levels):
        data += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return b"(" + data + b"t"


def test_billion_laughs_beside_the_weights_is_not_walked(path: Path) -> None:
    data = HEAD + b"}(" + text("lol") + doubled(200) + text("w") + vector(4) + b"u."
    with quick_and_small():
        assert outcome_of(archive(path, data)) == ["w"]


@pytest.mark.parametrize(
    "use", [b"}%sNs", b"]%sa}s", b"\x8f(%s\x90", b"(%s\x91"], ids=["key", "list", "set", "frozenset"]
)
def test_billion_laughs_is_never_hashed(path: Path, use: bytes) -> None:
    with quick_and_small():
        assert isinstance(outcome_of(archive(path, state(use % doubled(200)))), FormatError)


@pytest.mark.parametrize("where", ["shape", "name", "storage key", "alone"])
def test_billion_laughs_in_an_odd_place_is_refused(path: Path, where: str) -> None:
    lol = doubled(200)
    data = {
        "shape": state(tensor(lol, b")")),
        "name": HEAD + b"}" + lol + vector(4) + b"s.",
        "storage key": state(b"(" + text("storage") + b"ctorch\nFloatStorage\n" + lol + text("cpu") + b"K\x04tQ"),
        "alone": HEAD + lol + b".",
    }[where]
    refuse(path, data)


@pytest.mark.parametrize("key", [b")", b"]", b"}", number(2**61 - 1) + b"\x85", number(2**100), vector(4), b"C\x01a"])
def test_dict_keys_other_than_strings_and_numbers_are_refused(path: Path, key: bytes) -> None:
    refuse(path, HEAD + b"}" + key + b"Ns.", UnsafePickleError, "key")


def test_numbers_chosen_to_collide_as_keys_do_not_slow_the_reader(path: Path) -> None:
    keys = b"".join(number(i * (2**61 - 1)) + b"N" for i in range(20_000))
    refuse(path, HEAD + b"}(" + keys + b"u.", UnsafePickleError, "large number")


@pytest.mark.parametrize(
    "call",
    [
        b"ccollections\nOrderedDict\n" + b"h\0\x85R",
        b"ctorch\nSize\n" + b"h\0\x85R",
        b"ctorch._utils\n_rebuild_sparse_tensor\n" + b"h\x01R",
        b"cbuiltins\nset\n" + b"h\x01R",
        b"c_codecs\nencode\n" + b"h\x01R",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nset\nctorch\nTensor\nh\x01NtR",
    ],
)
def test_one_large_value_cannot_be_copied_many_times(path: Path, call: bytes) -> None:
    items = b"K\x01" * 50_000
    data = HEAD + b"](" + items + b"eq\0(" + items + b"tq\x01](" + call * 2_000 + b"e\x87."
    refuse(path, data)


def test_tensor_metadata_cannot_be_walked_many_times(path: Path) -> None:
    large = b"}(" + b"".join(number(i) + b"\x89" for i in range(5_000)) + b"uq\0"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage_id(4) + b"K\0))\x89Nh\0tR"
    refuse(path, HEAD + large + b"](" + call * 2_000 + b"e\x86.")


def test_compressed_pickle_bomb_is_refused(path: Path) -> None:
    archive(path, HEAD + b"]" * (60 << 20), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with quick_and_small(), pytest.raises(ArchiveError, match="too large"):
        read_bin(str(path))


def test_pickle_that_never_ends_is_refused_in_time(path: Path) -> None:
    archive(path, HEAD + b"N" * (2 << 20))
    with quick_and_small(seconds=3.0, n_bytes=128 << 20), pytest.raises(FormatError):
        read_bin(str(path))


# ---- tensors that are not there ----


@pytest.mark.parametrize(
    "value",
    [
        vector(5),
        vector(4, offset=1),
        vector(2, step=4),
        vector(1, offset=4),
        vector(2**62, step=2**62),
        tensor(b"K\x02K\x03\x86", b"K\x01K\x01\x86", offset=1),
        tensor(b"K\x00\x85", b"K\x01\x85", offset=5),
    ],
)
def test_tensor_beyond_its_storage_is_refused(path: Path, value: bytes) -> None:
    error = refuse(path, state(value), FormatError, "beyond its storage")
    assert error.key == "w"


@pytest.mark.parametrize("n_elements", [3, 5, 2**40, 2**62, 2**100, -4, 0])
def test_storage_of_another_size_than_its_entry_is_refused(path: Path, n_elements: int) -> None:
    error = refuse(path, state(vector(0, n_elements=n_elements)), FormatError, "size")
    assert error.key == "w"


def test_storage_that_is_not_in_the_file_is_refused(path: Path) -> None:
    error = refuse(path, state(tensor(b")", b")", key="../../0")), FormatError, "not in the file")
    assert error.key == "w"


def test_tensor_expanded_out_of_all_proportion_is_refused(path: Path) -> None:
    refuse(path, state(vector(2**40, step=0)), FormatError, "far larger")


def test_many_expanded_tensors_are_counted_together(path: Path) -> None:
    values = b"".join(text(f"w{i}") + vector(2**26, step=0) for i in range(8))
    refuse(path, HEAD + b"}(" + values + b"u.", FormatError, "far larger")


# ---- the archive ----


def entries_of(data: bytes) -> list[tuple[int, int]]:
    """Positions of each entry's record in the directory, and of its local header."""
    found, pos = [], data.find(b"PK\1\2")
    while pos >= 0:
        found.append((pos, struct.unpack_from("<I", data, pos + 42)[0]))
        pos = data.find(b"PK\1\2", pos + 4)
    return found


def damage(path: Path, change: Callable[[bytearray, list[tuple[int, int]]], None], match: str) -> None:
    archive(path, state(vector(4)), _0=bytes(16), _1=bytes(16))
    data = bytearray(path.read_bytes())
    change(data, entries_of(bytes(data)))
    path.write_bytes(data)
    with pytest.raises(FormatError, match=match) as caught:
        read_bin(str(path))
    assert caught.value.file == str(path)


def put(fmt: str, data: bytearray, pos: int, value: int) -> None:
    struct.pack_into(fmt, data, pos, value)


def test_entries_that_overlap_are_refused(path: Path) -> None:
    damage(path, lambda d, e: put("<I", d, e[2][0] + 42, e[1][1] + 4), "overlap|contradicts")


def test_two_names_for_one_entry_are_refused(path: Path) -> None:
    damage(path, lambda d, e: put("<I", d, e[2][0] + 42, e[1][1]), "overlap")


def test_entry_outside_of_the_file_is_refused(path: Path) -> None:
    damage(path, lambda d, e: put("<I", d, e[1][0] + 42, len(d) + 100), "overlap|outside")


def test_pickle_outside_of_the_file_is_refused(path: Path) -> None:
    damage(path, lambda d, e: put("<I", d, e[0][0] + 42, len(d) + 100), "overlap|outside")


def test_entry_larger_than_its_place_is_refused(path: Path) -> None:
    def change(data: bytearray, entries: list[tuple[int, int]]) -> None:
        for offset in (20, 24):
            put("<I", data, entries[1][0] + offset, 1 << 20)

    damage(path, change, "overlap")


def test_stored_entry_with_two_sizes_is_refused(path: Path) -> None:
    damage(path, lambda d, e: put("<I", d, e[1][0] + 24, 12), "two sizes")


@pytest.mark.parametrize(("offset", "fmt"), [(0, "<I"), (8, "<H"), (18, "<I"), (22, "<I"), (26, "<H"), (30, "<H")])
def test_local_header_that_contradicts_the_directory_is_refused(path: Path, offset: int, fmt: str) -> None:
    damage(path, lambda d, e: put(fmt, d, e[1][1] + offset, 8), "contradicts|other sizes")


def test_local_extra_field_that_reaches_into_the_next_entry_is_refused(path: Path) -> None:
    damage(path, lambda d, e: put("<H", d, e[1][1] + 28, 40), "overlap")


@pytest.mark.parametrize("flag", [0x0001, 0x0020, 0x0040, 0x2000])
def test_encrypted_entry_is_refused(path: Path, flag: int) -> None:
    damage(path, lambda d, e: put("<H", d, e[1][0] + 8, flag), "encrypted")


@pytest.mark.parametrize("method", [1, 9, 12, 14, 93, 95, 99])
def test_unknown_compression_is_refused(path: Path, method: int) -> None:
    damage(path, lambda d, e: put("<H", d, e[1][0] + 10, method), "compressed in a way")


def test_archive_in_several_parts_is_refused(path: Path) -> None:
    damage(path, lambda d, e: put("<H", d, len(d) - 18, 1), "one part of")


@pytest.mark.parametrize("n_entries", [0, 1, 3, 5, 0xFFFF])
def test_wrong_number_of_entries_is_refused(path: Path, n_entries: int) -> None:
    def change(data: bytearray, _: list[tuple[int, int]]) -> None:
        put("<H", data, len(data) - 14, n_entries)
        put("<H", data, len(data) - 12, n_entries)

    damage(path, change, "directory")


@pytest.mark.parametrize(("offset", "value"), [(10, 0xFFFFFFFE), (6, 0xFFFFFFFE), (10, 0), (6, 0)])
def test_directory_elsewhere_is_refused(path: Path, offset: int, value: int) -> None:
    damage(path, lambda d, e: put("<I", d, len(d) - offset, value), "directory")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
def test_two_entries_of_one_name_are_refused(path: Path, name: str) -> None:
    archive(path, state(vector(4)))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, bytes(16))
    with pytest.raises(ArchiveError, match="one name"):
        read_bin(str(path))


def test_two_archives_in_one_are_refused(path: Path) -> None:
    archive(path, state(vector(4)))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", state(vector(4)))
    with pytest.raises(ArchiveError, match="not one that torch"):
        read_bin(str(path))


def test_unknown_byte_order_is_refused(path: Path) -> None:
    archive(path, state(vector(4)))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", "middle")
    with pytest.raises(ArchiveError, match="byte order"):
        read_bin(str(path))


def test_compressed_pickle_that_is_damaged_is_refused(path: Path) -> None:
    archive(path, state(vector(4)), zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[60] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"decompressed|checksum"):
        read_bin(str(path))


def test_compressed_storage_that_claims_another_size_is_refused(path: Path) -> None:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    assert stream
    archive(path, state(vector(1 << 20, n_elements=1 << 20)), zipfile.ZIP_DEFLATED, _0=bytes(16))
    with pytest.raises(ArchiveError, match="size"):
        read_bin(str(path))


# ---- damage of every sort ----


def valid_files() -> dict[str, bytes]:
    base = torch.arange(12.0).reshape(3, 4)
    weights = {"a.weight": base, "a.bias": base[1], "b": torch.ones(2, dtype=torch.bool), "c": torch.tensor(1)}
    weights |= {f"layer.{i}": torch.full((i,), i) for i in range(20)}
    files = {}
    for name, options in {
        "zip": {},
        "zip4": {"pickle_protocol": 4},
        "legacy": {"_use_new_zipfile_serialization": False},
    }.items():
        stream = io.BytesIO()
        torch.save(weights, stream, **options)  # type: ignore[arg-type]
        files[name] = stream.getvalue()
    return files


FILES = valid_files()


def outcome_of(path: Path) -> list[str] | FastloadError:
    """The names in the file, or the error; any other exception is a failure. Regions must lie inside the file."""
    try:
        contents = read_bin(str(path))
    except FastloadError as error:
        if error.file != str(path) or len(str(error)) > 10_000:
            pytest.fail(f"an error that does not help: {str(error)[:1000]}")
        return error
    for spec in contents.specs:
        assert spec.region.offset_bytes >= 0
        if spec.region.encoding is None:
            assert spec.region.offset_bytes + spec.region.n_bytes <= contents.n_file_bytes
        stride, offset = (spec.view.stride, spec.view.offset) if spec.view else (None, 0)
        if stride is not None and 0 not in spec.shape:
            last = offset + sum((size - 1) * step for size, step in zip(spec.shape, stride, strict=True))
            assert (last + 1) * spec.dtype.itemsize <= spec.region.n_bytes
    return [spec.key for spec in contents.specs]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("twentieths", range(20))
def test_file_cut_short_is_refused(path: Path, kind: str, twentieths: int) -> None:
    data = FILES[kind]
    path.write_bytes(data[: len(data) * twentieths // 20])
    with quick_and_small():
        outcome = outcome_of(path)
    assert isinstance(outcome, FormatError)
    if twentieths and kind != "zip4":
        assert isinstance(outcome, TruncatedFileError)


@pytest.mark.parametrize("kind", FILES)
def test_file_cut_short_by_a_byte_is_refused(path: Path, kind: str) -> None:
    path.write_bytes(FILES[kind][:-1])
    assert isinstance(outcome_of(path), TruncatedFileError)


@pytest.mark.parametrize("kind", FILES)
def test_every_beginning_of_a_pickle_is_known_to_be_one(kind: str) -> None:
    # The older format does not say how long its pickle is: it is read until it is whole, from pieces cut anywhere.
    if kind == "legacy":
        stream = io.BytesIO(FILES[kind])
        for _ in range(3):
            pickle.load(stream)
        whole, start = FILES[kind], stream.tell()
    else:
        with zipfile.ZipFile(io.BytesIO(FILES[kind])) as file:
            whole, start = file.read("archive/data.pkl"), 0

    def load(data: bytes) -> int:
        return load_pickle(data, start, "file", lambda saved: StorageStub(saved[2], saved[1], saved[4]))[1]  # type: ignore[index]

    n_bytes = load(whole)
    assert kind == "legacy" or n_bytes == len(whole)
    for end in range(start, n_bytes):
        with pytest.raises(PickleEndsEarlyError):
            load(whole[:end])
    assert load(whole[:n_bytes] + b"whatever follows") == n_bytes


@settings(max_examples=400, deadline=1_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(FILES)),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=8),
)
def test_random_damage_is_an_error_of_ours_or_harmless(
    tmp_path: Path, kind: str, flips: list[tuple[float, int]]
) -> None:
    data = bytearray(FILES[kind])
    for place, bits in flips:
        data[int(place * (len(data) - 1))] ^= bits
    path = tmp_path / "flipped.bin"
    path.write_bytes(data)
    outcome_of(path)


def test_damage_anywhere_in_a_pickle_is_an_error_of_ours_or_harmless(path: Path) -> None:
    chance = random.Random(7)
    with zipfile.ZipFile(io.BytesIO(FILES["zip"])) as file:
        data_pkl = file.read("archive/data.pkl")
    for place in range(0, len(data_pkl), 3):
        changed = bytearray(data_pkl)
        changed[place] = chance.randrange(256)
        outcome_of(archive(path, bytes(changed)))


@settings(max_examples=300, deadline=1_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.one_of(
            st.sampled_from([bytes([code]) for code in range(256)]),
            st.sampled_from(
                [b"(", b"t", b"R", b"Q", b"}", b"u", b"s", b"]", b"e", b"\x85", b"q\0", b"h\0", b"b", b"N"]
            ),
            st.sampled_from([text("w"), vector(4), ORDERED_DICT, storage_id(4), b"ctorch\nSize\n", number(5)]),
        ),
        max_size=30,
    )
)
@example(parts=[b"}", text("w"), vector(4), b"s"])
def test_random_opcodes_are_an_error_of_ours_or_harmless(tmp_path: Path, parts: list[bytes]) -> None:
    outcome_of(archive(tmp_path / "random.bin", HEAD + b"".join(parts) + b"."))
