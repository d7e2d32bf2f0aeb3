"""Pieces of files side by side in memory, equal to what copying them would give."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastload.errors import TruncatedFileError, UnreadableFileError
from fastload.storage import remapping
from fastload.storage.remapping import FilePiece, lay_out, mappings_left

PAGE = 4096
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are remapped on Linux only")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in ("a", "b"):
        content = torch.randint(0, 256, (40 * PAGE,), generator=generator, dtype=torch.uint8).numpy().tobytes()
        (folder / name).write_bytes(content)
        made[str(folder / name)] = content
    return made


def side_by_side(files: dict[str, bytes], cuts: list[tuple[int, int, int]]) -> tuple[list[FilePiece], bytes]:
    """Pieces (file number, offset, length) one after another, and the bytes they should give."""
    names = sorted(files)
    pieces, expected = [], b""
    for number, begin, length in cuts:
        name = names[number]
        pieces.append(FilePiece(name, begin, len(expected), length))
        expected += files[name][begin : begin + length]
    return pieces, expected


lengths = st.one_of(st.integers(0, 3 * PAGE), st.sampled_from([PAGE, 2 * PAGE, 5 * PAGE]))
offsets = st.one_of(st.integers(0, 30 * PAGE), st.integers(0, 30).map(lambda n: n * PAGE + 64))


@given(st.lists(st.tuples(st.integers(0, 1), offsets, lengths), min_size=1, max_size=12), st.randoms())
def test_any_pieces_give_the_bytes_that_copying_gives(
    files: dict[str, bytes], cuts: list[tuple[int, int, int]], shuffled: object
) -> None:
    pieces, expected = side_by_side(files, cuts)
    if not expected:
        return
    shuffled.shuffle(pieces)  # type: ignore[attr-defined]
    layout = lay_out(pieces, len(expected), 1)
    assert bytes(layout.buffer) == expected
    assert layout.n_mapped_bytes + layout.n_copied_bytes == len(expected)


def test_pieces_that_agree_within_the_page_are_mapped(files: dict[str, bytes]) -> None:
    pieces, expected = side_by_side(files, [(0, 64 + 8 * PAGE, 4 * PAGE), (1, 64, 4 * PAGE), (0, 64, 4 * PAGE)])
    layout = lay_out(pieces, len(expected), 4)
    assert bytes(layout.buffer) == expected
    # The two pages that neighbours share are written to; those at the ends of the range hold one piece alone.
    assert layout.n_mapped_bytes == 10 * PAGE


def test_a_write_changes_neither_file_nor_neighbour(files: dict[str, bytes]) -> None:
    pieces, expected = side_by_side(files, [(0, 0, 2 * PAGE), (0, 0, 2 * PAGE)])
    layout = lay_out(pieces, len(expected), 4)
    tensor = torch.frombuffer(layout.buffer, dtype=torch.uint8)
    tensor[: 2 * PAGE] = 7
    assert bytes(layout.buffer)[2 * PAGE :] == expected[2 * PAGE :]
    name = sorted(files)[0]
    assert Path(name).read_bytes() == files[name]


def test_the_range_lives_as_long_as_a_tensor_on_it_and_no_longer(files: dict[str, bytes]) -> None:
    gc.collect()
    before, n_descriptors = mappings_left(), len(os.listdir("/proc/self/fd"))
    pieces, expected = side_by_side(files, [(1, 64, 4 * PAGE), (0, 64, 4 * PAGE)])
    tensor = torch.frombuffer(lay_out(pieces, len(expected), 4).buffer, dtype=torch.uint8)[PAGE:]
    gc.collect()
    assert mappings_left() < before
    assert bytes(tensor.tolist()) == expected[PAGE:]
    del tensor
    gc.collect()
    assert mappings_left() == before
    assert len(os.listdir("/proc/self/fd")) == n_descriptors


def test_without_a_budget_pieces_are_read(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remapping, "_RESERVED_MAPPINGS", 10**9)
    pieces, expected = side_by_side(files, [(0, 64, 4 * PAGE), (1, 64, 4 * PAGE)])
    layout = lay_out(pieces, len(expected), 4)
    assert bytes(layout.buffer) == expected
    assert layout.n_mapped_bytes == 0


def test_large_pieces_that_do_not_agree_are_read_in_parallel(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remapping, "_READ_BYTES", 3 * PAGE + 5)
    pieces, expected = side_by_side(files, [(0, 0, 10 * PAGE), (1, 33, 11 * PAGE), (0, 77, 9 * PAGE)])
    layout = lay_out(pieces, len(expected), 4)
    assert bytes(layout.buffer) == expected


def test_a_file_cut_in_the_meantime_is_an_error_and_costs_no_budget(tmp_path: Path) -> None:
    gc.collect()
    before = mappings_left()
    (tmp_path / "short").write_bytes(b"x" * PAGE)
    with pytest.raises(TruncatedFileError, match="short"):
        lay_out([FilePiece(str(tmp_path / "short"), 0, 0, 2 * PAGE)], 2 * PAGE, 1)
    with pytest.raises(UnreadableFileError, match="gone"):
        lay_out([FilePiece(str(tmp_path / "gone"), 0, 0, PAGE)], PAGE, 1)
    gc.collect()
    assert mappings_left() == before
