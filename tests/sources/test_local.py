from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastload.errors import (
    AmbiguousCheckpointError,
    CheckpointNotFoundError,
    FormatError,
    IndexFileError,
    OptionError,
)
from fastload.formats.index import encode_index
from fastload.options import FileOptions
from fastload.sources.local import find_weights
from tests.sources.checkpoints import CONFIG, bin_bytes, safetensors_bytes, sharded, write

SAFE_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def names(paths: tuple[str, ...]) -> list[str]:
    return [os.path.basename(path) for path in paths]


def test_single_file_is_found(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": safetensors_bytes(), "config.json": CONFIG})
    files = find_weights(tmp_path)
    assert files.weights == (str(tmp_path / "model.safetensors"),)
    assert files.folder == str(tmp_path)
    assert (files.format, files.index, files.weight_map, files.notes) == ("safetensors", None, None, ())


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    write(tmp_path, sharded())
    files = find_weights(tmp_path)
    assert files.index == str(tmp_path / SAFE_INDEX)
    assert names(files.weights) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert files.weight_map == {f"layer.{i}": path for i, path in enumerate(files.weights)}


def test_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"model.safetensors": safetensors_bytes()})
    monkeypatch.chdir(tmp_path)
    assert find_weights(".").weights == (str(tmp_path / "model.safetensors"),)


def test_formats_are_chosen_in_transformers_order(tmp_path: Path) -> None:
    every = [
        {"model.safetensors": safetensors_bytes()},
        sharded(),
        {"pytorch_model.bin": bin_bytes()},
        sharded(BIN_INDEX, BIN_SHARDS),
    ]
    for first in range(4):
        for second in range(first + 1, 4):
            folder = write(tmp_path / f"{first}{second}", {**every[first], **every[second]})
            if {first, second} in ({0, 1}, {2, 3}):
                with pytest.raises(AmbiguousCheckpointError):
                    find_weights(folder)
            else:
                files = find_weights(folder)
                assert set(names(files.weights)) <= set(every[first])
                assert len(files.notes) == 1
                assert "was not used" in files.notes[0]


@pytest.mark.parametrize(
    ("use_safetensors", "expected"), [(None, "safetensors"), (True, "safetensors"), (False, "bin")]
)
def test_use_safetensors_restricts_the_choice(tmp_path: Path, use_safetensors: bool | None, expected: str) -> None:
    write(tmp_path, {"model.safetensors": safetensors_bytes(), "pytorch_model.bin": bin_bytes()})
    assert find_weights(tmp_path, FileOptions(use_safetensors=use_safetensors)).format == expected


@pytest.mark.parametrize(
    "content",
    [
        {"model.fp16.safetensors": safetensors_bytes()},
        sharded("model.safetensors.index.fp16.json", ["model.fp16-00001-of-00001.safetensors"]),
        {"pytorch_model.fp16.bin": safetensors_bytes()},
        sharded("pytorch_model.bin.index.fp16.json", ["pytorch_model.fp16-00001-of-00001.bin"]),
    ],
)
def test_variant_is_found_beside_the_plain_weights(tmp_path: Path, content: dict[str, bytes]) -> None:
    write(tmp_path, {"model.safetensors": safetensors_bytes(), **content})
    assert "fp16" in find_weights(tmp_path, FileOptions(variant="fp16")).weights[0]
    assert names(find_weights(tmp_path).weights) == ["model.safetensors"]


def test_subfolder_is_looked_in(tmp_path: Path) -> None:
    write(tmp_path, {"a/b/model.safetensors": safetensors_bytes(), "model.safetensors": b""})
    assert find_weights(tmp_path, FileOptions(subfolder="a/b")).folder == str(tmp_path / "a" / "b")


def test_links_into_another_folder_are_followed(tmp_path: Path) -> None:
    files = sharded()
    write(tmp_path / "blobs", files)
    (tmp_path / "snapshot").mkdir()
    for name in files:
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    assert len(find_weights(tmp_path / "snapshot").weights) == 3


# One file, given by its path


@pytest.mark.parametrize("name", ["weights", "model.bin", "x.safetensors", "odd.name"])
def test_safetensors_file_of_any_name_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    write(tmp_path, {name: safetensors_bytes()})
    assert find_weights(tmp_path / name).format == "safetensors"


def test_bin_file_of_any_name_is_known_by_its_content(tmp_path: Path) -> None:
    import torch

    write(tmp_path, {"weights": bin_bytes()})
    torch.save({"a": torch.zeros(1)}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    assert find_weights(tmp_path / "weights").format == "bin"
    assert find_weights(tmp_path / "legacy").format == "bin"


def test_file_is_taken_whatever_else_is_in_its_folder(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": safetensors_bytes(), **sharded()})
    assert names(find_weights(tmp_path / "model.safetensors").weights) == ["model.safetensors"]
    assert len(find_weights(tmp_path / SAFE_INDEX).weights) == 3


@pytest.mark.parametrize("content", [b"", b"hello, this is text"])
def test_file_that_is_no_weights_is_rejected(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, {"notes.txt": content})
    with pytest.raises(FormatError, match="neither safetensors nor"):
        find_weights(tmp_path / "notes.txt")


def test_config_given_as_weights_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": CONFIG})
    with pytest.raises(IndexFileError, match="maps no key"):
        find_weights(tmp_path / "config.json")


def test_file_against_use_safetensors_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, {"a.bin": bin_bytes()})
    with pytest.raises(OptionError, match="use_safetensors=True"):
        find_weights(tmp_path / "a.bin", FileOptions(use_safetensors=True))


def test_subfolder_of_a_file_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, {"a.bin": bin_bytes()})
    with pytest.raises(OptionError, match="the path is a file"):
        find_weights(tmp_path / "a.bin", FileOptions(subfolder="sub"))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer_is_told_from_weights(tmp_path: Path, name: str) -> None:
    write(tmp_path, {name: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"})
    with pytest.raises(FormatError, match="git lfs pull"):
        find_weights(tmp_path)


def test_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="is not a file"):
        find_weights(tmp_path)


# Nothing to be found


def test_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such file or folder") as caught:
        find_weights(tmp_path / "none")
    assert caught.value.file == str(tmp_path / "none")


def test_missing_subfolder_is_told_with_those_there(tmp_path: Path) -> None:
    write(tmp_path, {"unet/x": b"", "vae/x": b"", "file": b""})
    with pytest.raises(CheckpointNotFoundError, match=r"does not exist(.|\n)*these folders: unet, vae\n"):
        find_weights(tmp_path, FileOptions(subfolder="text"))
    with pytest.raises(CheckpointNotFoundError, match="the subfolder is a file"):
        find_weights(tmp_path, FileOptions(subfolder="file"))


def test_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no files here at all(.|\n)*model\.safetensors or model"):
        find_weights(tmp_path)


def test_folder_without_weights_is_told_with_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": CONFIG, "tf_model.h5": b"", ".hidden": b""})
    with pytest.raises(CheckpointNotFoundError, match=r"found: +config.json, tf_model.h5\n"):
        find_weights(tmp_path)


def test_long_listing_is_cut(tmp_path: Path) -> None:
    write(tmp_path, {f"f{i:03}": b"" for i in range(50)})
    with pytest.raises(CheckpointNotFoundError, match="f019 and 30 more"):
        find_weights(tmp_path)


def test_absent_variant_is_told_with_those_there(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "model.safetensors": b"",
            "model.fp16.safetensors": b"",
            "pytorch_model.bin.index.int8.json": b"",
            "model.bf16-00001-of-00002.safetensors": b"",
        },
    )
    with pytest.raises(
        CheckpointNotFoundError, match="variant='fp16' or variant='int8' or leave variant out"
    ) as caught:
        find_weights(tmp_path, FileOptions(variant="bf16"))
    assert "variant 'bf16'" in caught.value.problem


def test_absent_plain_weights_are_told_with_the_variants_there(tmp_path: Path) -> None:
    write(tmp_path, {"model.fp16.safetensors": b""})
    with pytest.raises(CheckpointNotFoundError, match="pass variant='fp16'"):
        find_weights(tmp_path)


def test_format_ruled_out_by_use_safetensors_is_told(tmp_path: Path) -> None:
    write(tmp_path, {"pytorch_model.bin": bin_bytes()})
    with pytest.raises(CheckpointNotFoundError, match=r"are \.bin, which use_safetensors=True rules out"):
        find_weights(tmp_path, FileOptions(use_safetensors=True))


def test_shards_without_index_are_told(tmp_path: Path) -> None:
    files = sharded()
    del files[SAFE_INDEX]
    with pytest.raises(CheckpointNotFoundError, match="shards here, but no index"):
        find_weights(write(tmp_path, files))


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    files = sharded()
    del files["model-00001-of-00003.safetensors"]
    write(tmp_path, files)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointNotFoundError, match="2 of 3 shards") as caught:
        find_weights(tmp_path)
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in str(caught.value.expected)
    assert caught.value.file == str(tmp_path / SAFE_INDEX)


def test_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointNotFoundError, match="link to a file that does not exist"):
        find_weights(tmp_path)


def test_index_out_of_the_folder_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, {"secret.safetensors": safetensors_bytes()})
    write(tmp_path / "model", {SAFE_INDEX: encode_index({"a": "../secret.safetensors"}, 4, 16).encode()})
    with pytest.raises(IndexFileError, match="leaves the folder"):
        find_weights(tmp_path / "model")


def test_index_of_two_formats_is_rejected(tmp_path: Path) -> None:
    index = encode_index({"a": "a.safetensors", "b": "b.bin"}, 4, 16).encode()
    write(tmp_path, {SAFE_INDEX: index, "a.safetensors": safetensors_bytes(), "b.bin": bin_bytes()})
    with pytest.raises(IndexFileError, match="two formats"):
        find_weights(tmp_path)


# Two checkpoints in one folder


def test_single_file_beside_an_indexed_checkpoint_is_ambiguous(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": safetensors_bytes(), **sharded()})
    with pytest.raises(AmbiguousCheckpointError, match="delete the stale one") as caught:
        find_weights(tmp_path)
    assert "model.safetensors, and model.safetensors.index.json with model-00001" in str(caught.value.found)


def test_a_part_of_the_shards_is_ambiguous_too(tmp_path: Path) -> None:
    files = sharded()
    del files["model-00002-of-00003.safetensors"]
    write(tmp_path, {"model.safetensors": safetensors_bytes(), **files})
    with pytest.raises(AmbiguousCheckpointError):
        find_weights(tmp_path)


def test_index_that_names_only_the_single_file_is_not_ambiguous(tmp_path: Path) -> None:
    index = encode_index({"weight": "model.safetensors"}, 4, 16).encode()
    files = find_weights(write(tmp_path, {"model.safetensors": safetensors_bytes(), SAFE_INDEX: index}))
    assert names(files.weights) == ["model.safetensors"]
    assert files.notes == ()


def test_index_without_its_shards_is_noted(tmp_path: Path) -> None:
    files = find_weights(write(tmp_path, {"model.safetensors": safetensors_bytes(), SAFE_INDEX: sharded()[SAFE_INDEX]}))
    assert names(files.weights) == ["model.safetensors"]
    assert files.notes == (f"{SAFE_INDEX} is also here, none of its shards is, and it was not used",)


def test_damaged_index_beside_a_single_file_is_noted(tmp_path: Path) -> None:
    files = find_weights(write(tmp_path, {"model.safetensors": safetensors_bytes(), SAFE_INDEX: b"{"}))
    assert names(files.weights) == ["model.safetensors"]
    assert "not valid JSON" in files.notes[0]


# No right to read. Root may read everything, so these run as nobody.


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter; pytest's own are the user's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_nobody(call: str) -> str:
    """What ``call`` raises, run by a user without rights."""
    program = f"""
import os
from fastload.sources.local import find_weights
from fastload.sources.resolve import locate_checkpoint, locate_config
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    {call}
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", SAFE_INDEX])
def test_file_without_the_right_to_read_is_told(open_folder: Path, name: str) -> None:
    write(open_folder, sharded() if name == SAFE_INDEX else {name: safetensors_bytes()})
    (open_folder / name).chmod(0)
    message = as_nobody(f"find_weights({str(open_folder)!r})")
    assert message.startswith("UnreadableFileError")
    assert "Permission denied" in message
    assert str(open_folder / name) in message


@pytest.mark.parametrize("mode", [0o000, 0o003, 0o006])
def test_folder_without_the_right_to_list_or_enter_is_told(open_folder: Path, mode: int) -> None:
    folder = write(open_folder / "checkpoint", {"model.safetensors": safetensors_bytes()})
    folder.chmod(mode if os.getuid() == 0 else mode << 6)
    try:
        whole = as_nobody(f"find_weights({str(folder)!r})")
        below = as_nobody(f"locate_checkpoint({str(folder / 'model.safetensors')!r})")
    finally:
        folder.chmod(0o755)
    assert whole.startswith("UnreadableFileError")
    assert f"file:     {folder}\n" in whole
    can_enter = mode == 0o003  # who may enter a folder may open what he can name
    assert below.startswith("UnreadableFileError") != can_enter
