"""Tensors converted to another type while they are read, equal to `Tensor.to` in every byte."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastload.dtypes import DTYPES, DType, to_torch
from fastload.errors import ArchiveError
from fastload.formats.specs import Encoding, Region, StorageView, TensorSpec
from fastload.storage import casting, slabs
from fastload.storage.casting import CastRequest, cast_tensors
from fastload.storage.mapping import MappedFile
from fastload.storage.slabs import HUGE_PAGE, HugePages, Slab
from tests.conftest import same_bytes

CASTABLE = [dtype for dtype in DTYPES.values() if dtype.castable]
castables = st.sampled_from(CASTABLE)
N_FILE_BYTES = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Where the share of one of torch's threads ends, `Tensor.to` gives other bits for a NaN.."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casting, "_n_threads", lambda n_elements: 2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of random bits: among its floats of any type are NaN with payloads, infinities and denormals."""
    bits = torch.randint(0, 256, (N_FILE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # All exponent bits set in every seventh 8 bytes, in whichever type they are read.
    bits.view(-1, 8)[::7, 1::2] |= 0x7F
    bits.view(-1, 8)[::7, ::2] |= 0xF0
    file = tmp_path_factory.mktemp("bits") / "weights"
    file.write_bytes(bits.numpy().tobytes())
    return str(file)


def request(
    file: MappedFile,
    source: DType,
    target: DType,
    shape: tuple[int, ...],
    offset: int = 0,
    *,
    n_storage: int | None = None,
    view: StorageView | None = None,
) -> CastRequest:
    n_elements = torch.Size(shape).numel() if n_storage is None else n_storage
    region = Region(file.path, offset, n_elements * source.itemsize)
    return CastRequest(file, TensorSpec("t", source, shape, region, view), target)


def cast(*requests: CastRequest) -> list[torch.Tensor]:
    n_bytes_told = []
    tensors = cast_tensors(requests, n_bytes_told.append)
    assert sum(n_bytes_told) >= sum({r.spec.region: r.spec.region.n_bytes for r in requests}.values())
    return tensors


def plainly(request: CastRequest) -> torch.Tensor:
    return MappedFile(request.file.path, N_FILE_BYTES).tensor(request.spec).to(to_torch(request.dtype))


@pytest.mark.parametrize("target", CASTABLE, ids=repr)
@pytest.mark.parametrize("source", CASTABLE, ids=repr)
def test_every_pair_of_types_gives_the_bytes_of_to(path: str, source: DType, target: DType, two_threads: None) -> None:
    whole = request(MappedFile(path, N_FILE_BYTES), source, target, (N_FILE_BYTES // source.itemsize,))
    assert plainly(whole).isnan().any()
    assert same_bytes(cast(whole)[0], plainly(whole))


@given(
    castables,
    castables,
    st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=12),
    st.integers(0, 9),
    st.integers(1, 5).map(lambda n: 64 * n),
    st.sampled_from([64, 128, 192]),
    st.sampled_from([256, 4096, 1 << 20]),
)
def test_any_shapes_one_after_another_over_any_block_boundaries(
    path: str,
    source: DType,
    target: DType,
    shapes: list[list[int]],
    offset: int,
    n_batch: int,
    n_piece: int,
    n_slab_bytes: int,
) -> None:
    file = MappedFile(path, N_FILE_BYTES)
    requests = []
    for shape in shapes:
        requests.append(request(file, source, target, tuple(shape), offset))
        offset += requests[-1].spec.region.n_bytes
        if offset > N_FILE_BYTES - 64000 * 8:
            break
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casting, "BATCH_ELEMENTS", n_batch)
        patch.setattr(casting, "PIECE_ELEMENTS", n_piece)
        patch.setattr(casting, "SLAB_BYTES", n_slab_bytes)
        patch.setattr(casting, "_n_threads", lambda n_elements: 2)
        patch.setattr(casting, "_HUGE_FROM_BYTES", 0)
        tensors = cast(*requests)
    for one, tensor in zip(requests, tensors, strict=True):
        assert same_bytes(tensor, plainly(one))
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@given(
    castables, castables, st.integers(0, 5), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.permutations([0, 1])
)
def test_views_of_a_storage(
    path: str, source: DType, target: DType, begin: int, shape: tuple[int, int], order: list[int]
) -> None:
    file = MappedFile(path, N_FILE_BYTES)
    stride = (1, shape[0]) if order == [1, 0] else (7, 1)
    view = StorageView(begin, stride)
    part = request(file, source, target, shape, 256, n_storage=60, view=view)
    assert torch.equal(cast(part)[0].nan_to_num(), plainly(part).nan_to_num())
    assert cast(part)[0].untyped_storage().nbytes() <= 60 * target.itemsize


def test_a_transposed_tensor_stays_transposed_and_exact(path: str) -> None:
    file = MappedFile(path, N_FILE_BYTES)
    part = request(file, DTYPES["F16"], DTYPES["F32"], (300, 200), n_storage=60000, view=StorageView(0, (1, 300)))
    tensor = cast(part)[0]
    assert tensor.stride() == (1, 300)
    assert same_bytes(tensor, plainly(part))


def test_a_scalar_and_an_empty_tensor(path: str) -> None:
    file = MappedFile(path, N_FILE_BYTES)
    requests = [
        request(file, DTYPES["F32"], DTYPES["BF16"], (), 8),
        request(file, DTYPES["F32"], DTYPES["BF16"], (0, 3), 12),
    ]
    for one, tensor in zip(requests, cast(*requests), strict=True):
        assert same_bytes(tensor, plainly(one))


def test_a_scalar_beside_the_storage_it_is_part_of(path: str) -> None:
    file = MappedFile(path, N_FILE_BYTES)
    scalar, whole = cast(
        request(file, DTYPES["BF16"], DTYPES["F32"], (), n_storage=8, view=StorageView(5, ())),
        request(file, DTYPES["BF16"], DTYPES["F32"], (8,)),
    )
    whole.fill_(3)
    assert scalar.item() == 3


def test_nothing_asked_for_is_nothing_made() -> None:
    assert cast() == []


def test_requests_for_one_region_and_type_share_a_storage(path: str) -> None:
    file = MappedFile(path, N_FILE_BYTES)
    a, b, other = cast(
        request(file, DTYPES["BF16"], DTYPES["F32"], (4, 8)),
        request(file, DTYPES["BF16"], DTYPES["F32"], (8,), n_storage=32, view=StorageView(8, (1,))),
        request(file, DTYPES["BF16"], DTYPES["F64"], (4, 8)),
    )
    assert a.untyped_storage()._cdata == b.untyped_storage()._cdata != other.untyped_storage()._cdata
    a.fill_(3)
    assert b.tolist() == [3] * 8


def test_a_small_part_of_a_large_storage_does_not_convert_all_of_it(path: str) -> None:
    file = MappedFile(path, N_FILE_BYTES)
    part = request(file, DTYPES["F32"], DTYPES["BF16"], (3,), n_storage=200_000, view=StorageView(100_000, (2,)))
    tensor = cast(part)[0]
    assert tensor.untyped_storage().nbytes() == 6
    assert same_bytes(tensor, plainly(part))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_misaligned_source(path: str, offset: int, two_threads: None) -> None:
    file = MappedFile(path, N_FILE_BYTES)
    one = request(file, DTYPES["F32"], DTYPES["BF16"], (200_000,), offset)
    assert same_bytes(cast(one)[0], plainly(one))


def compressed(folder: Path, raw: bytes, crc32: int) -> CastRequest:
    deflate = zlib.compressobj(wbits=-15)
    packed = deflate.compress(raw) + deflate.flush()
    (folder / "packed").write_bytes(packed)
    file = MappedFile(str(folder / "packed"), len(packed))
    region = Region(file.path, 0, len(raw), Encoding("deflate", len(packed), crc32, 1))
    return CastRequest(file, TensorSpec("t", DTYPES["F32"], (len(raw) // 4,), region), DTYPES["BF16"])


def test_a_compressed_source(tmp_path: Path) -> None:
    values = torch.arange(1000.0)
    raw = values.numpy().tobytes()
    one = compressed(tmp_path, raw, zlib.crc32(raw))
    a, b = cast(one, one)
    assert same_bytes(a, values.bfloat16())
    assert a.untyped_storage()._cdata == b.untyped_storage()._cdata
    with pytest.raises(ArchiveError, match="packed"):
        cast(compressed(tmp_path, raw, 1))


def test_a_copy_or_a_pickle_of_one_tensor_is_no_larger_than_it(path: str) -> None:
    file = MappedFile(path, N_FILE_BYTES)
    first, second = cast(*(request(file, DTYPES["BF16"], DTYPES["F32"], (64,), 128 * i) for i in range(2)))
    assert second.data_ptr() - first.data_ptr() == first.nbytes
    pickled = io.BytesIO()
    torch.save(second, pickled)
    assert pickled.tell() < 4096
    assert copy.deepcopy(second).untyped_storage().nbytes() == second.nbytes == 256


def test_tensors_outlive_the_file_and_their_neighbours_and_the_slab_ends_with_them(path: str) -> None:
    n_mappings = count_mappings()
    file = MappedFile(path, N_FILE_BYTES)
    one = request(file, DTYPES["BF16"], DTYPES["F32"], (1000,), 2000)
    expected = plainly(one)
    tensors = cast(request(file, DTYPES["BF16"], DTYPES["F32"], (1000,)), one)
    last = tensors.pop()
    del file, one, tensors
    gc.collect()
    assert same_bytes(last, expected)
    del last
    gc.collect()
    assert count_mappings() <= n_mappings


def count_mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("weights" in line for line in maps)


class FailingFile(MappedFile):
    """A file that fails, at an offset or in any thread but the first."""

    def __init__(self, path: str, at: int) -> None:
        super().__init__(path, N_FILE_BYTES)
        self.at, self.threads = at, set[threading.Thread]()

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        self.threads.add(threading.current_thread())
        if spec.region.offset_bytes >= self.at:
            raise OSError("the disk is on fire")
        return super().tensor(spec)


def test_an_error_in_a_thread_is_raised_and_all_threads_have_ended(
    path: str, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    monkeypatch.setattr(casting, "BATCH_ELEMENTS", 64)
    file = FailingFile(path, 500_000)
    before = threading.active_count()
    with pytest.raises(OSError, match="on fire"):
        cast(request(file, DTYPES["BF16"], DTYPES["F32"], (N_FILE_BYTES // 2,)))
    assert threading.active_count() == before
    assert not any(thread.is_alive() for thread in file.threads - {threading.current_thread()})


def test_an_interrupt_stops_every_thread(path: str, monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    monkeypatch.setattr(casting, "BATCH_ELEMENTS", 64)
    n_told = 0

    def interrupt(n_bytes: int) -> None:
        nonlocal n_told
        n_told += n_bytes
        raise KeyboardInterrupt

    before = threading.active_count()
    whole = request(MappedFile(path, N_FILE_BYTES), DTYPES["BF16"], DTYPES["F32"], (N_FILE_BYTES // 2,))
    with pytest.raises(KeyboardInterrupt):
        cast_tensors([whole], interrupt)
    assert threading.active_count() == before
    assert n_told < N_FILE_BYTES


def test_modes_of_the_caller_are_kept_and_do_not_matter(path: str, two_threads: None) -> None:
    n_threads = torch.get_num_threads()
    whole = request(MappedFile(path, N_FILE_BYTES), DTYPES["BF16"], DTYPES["F32"], (N_FILE_BYTES // 2,))
    expected = plainly(whole)
    with torch.inference_mode():
        assert same_bytes(cast(whole)[0], expected)
    with torch.device("meta"), torch.enable_grad():
        tensor = cast(whole)[0]
        assert torch.is_grad_enabled()
    assert same_bytes(tensor, expected)
    assert not tensor.requires_grad
    assert torch.get_num_threads() == n_threads


class TimedSlab(Slab):
    """A slab whose pages take a time of the test's choosing; notes what was asked for."""

    __slots__ = ("advice", "seconds")

    def __init__(self, n_bytes: int) -> None:
        super().__init__(n_bytes)
        self.seconds, self.advice = 0.0, list[tuple[int, bool]]()

    def touch(self, offset_bytes: int, n_bytes: int) -> float:
        return self.seconds

    def advise(self, pages: range, *, huge: bool) -> None:
        super().advise(pages, huge=huge)
        self.advice += [(at // HUGE_PAGE, huge) for at in pages]


def test_huge_pages_are_asked_for_while_they_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_small_pages_seconds", lambda: 1.0)
    monkeypatch.setattr(slabs, "_FIRST_PAUSE_BYTES", 2 * HUGE_PAGE)
    pages, slab = HugePages(), TimedSlab(20 * HUGE_PAGE + 5)

    def asked_for(begin: int, end: int, seconds: float) -> list[bool]:
        slab.seconds, slab.advice = seconds, []
        pages.prepare(slab, begin * HUGE_PAGE, (end - begin) * HUGE_PAGE)
        assert [at for at, _ in slab.advice] == list(range(begin, end))
        return [huge for _, huge in slab.advice]

    assert asked_for(0, 3, 0.5) == [True, True, True]
    assert asked_for(3, 6, 2.0) == [True, False, False]
    assert asked_for(6, 8, 0.5) == [False, False]
    assert asked_for(8, 10, 2.0) == [True, False]
    assert asked_for(10, 14, 0.5) == [False] * 4
    assert asked_for(14, 16, 0.5) == [True, True]
    assert asked_for(16, 18, 2.0) == [True, False]
    assert asked_for(18, 20, 0.5) == [False, False]


@pytest.mark.parametrize(
    ("offset", "n_bytes", "pages"),
    [(0, 5, [0]), (1, HUGE_PAGE, [1]), (1, 5, []), (0, 4 * HUGE_PAGE, [0, 1, 2]), (3 * HUGE_PAGE, 7, [])],
)
def test_a_huge_page_belongs_to_the_range_in_which_it_begins(offset: int, n_bytes: int, pages: list[int]) -> None:
    slab = Slab(3 * HUGE_PAGE + 7)
    assert [at // HUGE_PAGE for at in slab.huge_pages_of(offset, n_bytes)] == pages


@pytest.mark.parametrize("n_bytes", [1, 4096, HUGE_PAGE, 2 * HUGE_PAGE + 3])
@pytest.mark.parametrize("huge", [False, True])
def test_any_slab_takes_advice_and_all_of_it_is_memory(n_bytes: int, huge: bool) -> None:
    slab = Slab(n_bytes)
    slab.advise(slab.huge_pages_of(0, n_bytes), huge=huge)
    assert slab.touch(0, n_bytes) >= 0
    tensor = slab.tensor(DTYPES["U8"], 0, n_bytes)
    assert not tensor.any()
    assert tensor.fill_(7).min() == 7


PEAK = """
import resource, sys
import torch
from fastload.loader import load_state_dict

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) << 10

before = status("VmRSS")
tensors = load_state_dict(sys.argv[1], dtype="float32")
n_bytes = sum(tensor.nbytes for tensor in tensors.values())
print(status("VmHWM") - before - n_bytes, status("RssAnon"), n_bytes)
"""


@pytest.mark.parametrize("n_columns", [1 << 20, 500])
def test_the_peak_is_the_result_and_little_more(tmp_path: Path, n_columns: int) -> None:
    from safetensors.torch import save_file

    n_rows = (192 << 20) // n_columns // 2 // 32
    generator = torch.Generator().manual_seed(0)
    tensors = {str(i): torch.randn(n_rows, n_columns, generator=generator).bfloat16() for i in range(32)}
    save_file(tensors, tmp_path / "model.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    beyond, _, n_bytes = map(int, run.stdout.split())
    assert n_bytes == 2 * sum(tensor.nbytes for tensor in tensors.values())
    assert beyond < 64 << 20
