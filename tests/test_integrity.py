"""Checksums: written with a save, compared when asked for; shards known again by them; what a save waits for."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from safetensors import safe_open

import fastload
from fastload.errors import ArchiveError, IntegrityError, OptionError
from fastload.formats import checksums
from fastload.formats.safetensors import read_header
from fastload.loader import load_model, load_state_dict
from fastload.saver import save_state_dict
from fastload.sources.journal import JOURNAL_NAME
from fastload.sources.steady import read_steadily
from tests.conftest import same_bytes


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.full((2048,), float(value + i)) for i, name in enumerate("abcd")}


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def offset_of(path: Path, key: str) -> int:
    return next(spec.region.offset_bytes for spec in read_header(str(path)).specs if spec.key == key)


def test_checksums_are_those_of_the_tensors_bytes_in_the_order_of_the_file(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7.0),
        "page": torch.arange(2048.0),
        "empty": torch.empty(0),
        "t": torch.ones(3, 5).t(),
    }
    save_state_dict(tensors, tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    with safe_open(path, "pt") as file:
        algorithm, block, header, blocks = file.metadata()["fastload.checksums"].split()
    assert (algorithm, int(block)) == ("xxh3-64", 16 << 20)
    specs = [spec for spec in read_header(str(path)).specs if spec.region.n_bytes]
    parts = [data[spec.region.offset_bytes :][: spec.region.n_bytes] for spec in specs]
    assert blocks == "".join(xxhash.xxh3_64_hexdigest(part) for part in parts)
    beginning = data[: specs[0].region.offset_bytes]
    assert header == xxhash.xxh3_64_hexdigest(beginning.replace(header.encode(), b"0" * 16, 1))


def test_data_begins_on_a_page_and_whole_pages_come_first(tmp_path: Path) -> None:
    save_state_dict({"odd": torch.ones(3), "page": torch.ones(2048), "pages": torch.ones(4096)}, tmp_path)
    specs = read_header(str(tmp_path / "model.safetensors")).specs
    assert [spec.key for spec in specs] == ["page", "pages", "odd"]
    assert all(spec.region.offset_bytes % 4096 == 0 for spec in specs[:2])


def test_tensors_that_are_loaded_or_copied_for_writing_have_the_same_file(tmp_path: Path) -> None:
    values = {"a": torch.arange(3000.0), "b": torch.arange(12.0).reshape(3, 4)}
    save_state_dict(values, tmp_path / "at hand")
    from fastload.saver import save_checkpoint

    late = {"a": torch.empty(3000, device="meta"), "b": values["b"].t().contiguous().t()}
    save_checkpoint(late, tmp_path / "late", deferred={"a": lambda: values["a"]})
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("at hand", "late")]
    assert files[0] == files[1]


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_whole_files_are_verified_at_every_door(tmp_path: Path, max_shard_size: str) -> None:
    save_state_dict(weights(), tmp_path, max_shard_size=max_shard_size)
    found = load_state_dict(tmp_path, verify=True)
    assert all(same_bytes(found[key], tensor) for key, tensor in weights().items())
    module = torch.nn.ParameterDict({key.replace(".", "_"): torch.empty(2048) for key in weights()})
    load_model(module, tmp_path, key_mapping={r"\.": "_"}, verify=True)
    assert same_bytes(module["c_weight"].data, weights()["c.weight"])


@pytest.mark.parametrize("where", [0, 4095, 8191])
def test_flipped_bit_is_told_with_file_key_and_place(tmp_path: Path, where: int) -> None:
    save_state_dict(weights(), tmp_path)
    path = tmp_path / "model.safetensors"
    begin = offset_of(path, "c.weight")
    flip(path, begin + where)
    load_state_dict(tmp_path)  # nobody looked
    with pytest.raises(IntegrityError, match=f"in bytes {begin:,} to {begin + 8192:,} of the file") as caught:
        load_state_dict(tmp_path, verify=True)
    assert (caught.value.file, caught.value.key) == (str(path), "c.weight")


def test_flipped_bit_of_a_large_tensor_is_placed_within_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (40 << 20) // 8
    save_state_dict({"large": torch.arange(size)}, tmp_path)
    path = tmp_path / "model.safetensors"
    flip(path, 4096 + (33 << 20))
    with pytest.raises(IntegrityError) as caught:
        load_state_dict(tmp_path, verify=True)
    assert f"in bytes {4096 + (32 << 20):,} to {4096 + (40 << 20):,}" in str(caught.value)


def test_all_damaged_tensors_of_a_file_are_told(tmp_path: Path) -> None:
    save_state_dict(weights(), tmp_path)
    path = tmp_path / "model.safetensors"
    for key in ("a.weight", "d.weight"):
        flip(path, offset_of(path, key))
    with pytest.raises(IntegrityError) as caught:
        load_state_dict(tmp_path, verify=True)
    assert caught.value.key == "a.weight, d.weight"


def test_changed_header_is_found(tmp_path: Path) -> None:
    save_state_dict(weights(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"a.weight"', b'"z.weight"', 1))
    with pytest.raises(IntegrityError, match="the header is not the one"):
        load_state_dict(tmp_path, verify=True)


def test_file_that_another_program_wrote_with_our_checksums_is_found(tmp_path: Path) -> None:
    save_state_dict(weights(), tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(weights(2), path, metadata)
    with pytest.raises(IntegrityError, match="another program wrote it and kept the checksums"):
        load_state_dict(tmp_path, verify=True)


def test_shard_of_another_save_is_found_by_the_index(tmp_path: Path) -> None:
    save_state_dict(weights(1), tmp_path / "a", max_shard_size="20KB")
    save_state_dict(weights(2), tmp_path / "b", max_shard_size="20KB")
    name = "model-00002-of-00002.safetensors"
    os.replace(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(IntegrityError, match="not the one that the index was written with") as caught:
        load_state_dict(tmp_path / "a", verify=True)
    assert caught.value.file == str(tmp_path / "a" / name)


def test_file_without_checksums_cannot_be_verified(
    write_safetensors: Callable[..., Path], tensors: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(OptionError, match="carries no checksums"):
        load_state_dict(write_safetensors(tensors), verify=True)


def test_bin_is_verified_by_its_own_checksums(tmp_path: Path) -> None:
    save_state_dict({"w": torch.full((100,), 1.5)}, tmp_path, safe_serialization=False)
    load_state_dict(tmp_path, verify=True)
    path = tmp_path / "pytorch_model.bin"
    flip(path, path.read_bytes().index(torch.full((100,), 1.5).numpy().tobytes()))
    with pytest.raises(ArchiveError):
        load_state_dict(tmp_path, verify=True)


def test_models_are_verified(tmp_path: Path) -> None:
    config = fastload.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    fastload.BertModel(config).save_pretrained(tmp_path)
    import fastload.hf as hf

    for auto in (fastload.AutoModel, hf.AutoModel):
        auto.from_pretrained(tmp_path, verify=True)
    flip(tmp_path / "model.safetensors", offset_of(tmp_path / "model.safetensors", "pooler.dense.weight"))
    for auto in (fastload.AutoModel, hf.AutoModel):
        with pytest.raises(IntegrityError, match=r"pooler\.dense\.weight"):
            auto.from_pretrained(tmp_path, verify=True)


@pytest.mark.parametrize("command", [["verify"], ["verify", "--json"]])
def test_verify_command_tells_a_flipped_bit(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from fastload.cli import main

    save_state_dict(weights(), tmp_path)
    assert main([*command, str(tmp_path)]) == 0
    flip(tmp_path / "model.safetensors", offset_of(tmp_path / "model.safetensors", "b.weight") + 5)
    capsys.readouterr()
    assert main([*command, str(tmp_path)]) == 1
    assert "b.weight" in capsys.readouterr().out


def test_download_is_compared_with_the_name_that_the_hub_gave_it(
    tmp_path: Path, tensors: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    from fastload.cli import main

    data = safetensors.torch.save(tensors)
    blob = tmp_path / "blobs" / hashlib.sha256(data).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(data)
    folder = tmp_path / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(blob)
    load_state_dict(folder, verify=True)
    assert main(["verify", str(folder)]) == 0
    assert "compared with SHA-256 of the hub" in capsys.readouterr().out
    flip(blob, len(data) - 1)
    with pytest.raises(IntegrityError, match="not the one that the hub has"):
        load_state_dict(folder, verify=True)


# Incremental saves.


def test_shards_that_are_unchanged_are_kept(tmp_path: Path) -> None:
    save_state_dict(weights(), tmp_path, max_shard_size="10KB")
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    inodes = {name: (tmp_path / name).stat().st_ino for name in names}
    changed = weights() | {"c.weight": torch.full((2048,), 9.0)}
    report = save_state_dict(changed, tmp_path, max_shard_size="10KB", incremental=True)
    assert report.kept == (names[0], names[1], names[3])
    assert report.files == (names[2], "model.safetensors.index.json")
    assert report.removed == ()
    assert [name for name in names if (tmp_path / name).stat().st_ino != inodes[name]] == [names[2]]
    found = load_state_dict(tmp_path, verify=True)
    assert all(same_bytes(found[key], tensor) for key, tensor in changed.items())


def test_incremental_save_is_byte_for_byte_the_full_one(tmp_path: Path) -> None:
    changed = weights() | {"a.weight": torch.zeros(2048)}
    save_state_dict(weights(), tmp_path / "in steps", max_shard_size="10KB")
    save_state_dict(changed, tmp_path / "in steps", max_shard_size="10KB", incremental=True)
    save_state_dict(changed, tmp_path / "at once", max_shard_size="10KB")
    for path in (tmp_path / "at once").iterdir():
        assert (tmp_path / "in steps" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "other",
    [{"a": torch.ones(4)}, {"a": torch.ones(2, 2)}, {"b": torch.ones(4)}, {"a": torch.ones(4).int()}],
    ids=["the same", "shape", "name", "type"],
)
def test_only_the_same_tensors_are_known_again(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    save_state_dict({"a": torch.ones(4)}, tmp_path)
    report = save_state_dict(other, tmp_path, incremental=True)
    is_same = other.keys() == {"a"} and same_bytes(other["a"], torch.ones(4))
    assert report.kept == (("model.safetensors",) if is_same else ())


def test_file_of_others_is_written_anew(tmp_path: Path, write_safetensors: Callable[..., Path]) -> None:
    folder = write_safetensors(weights())
    assert save_state_dict(weights(), folder, incremental=True).kept == ()
    assert load_state_dict(folder, verify=True).keys() == weights().keys()


def test_bin_cannot_be_saved_incrementally(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no checksums"):
        save_state_dict(weights(), tmp_path / "new", incremental=True, safe_serialization=False)
    assert not (tmp_path / "new").exists()


# Durability.


@pytest.mark.parametrize(("durability", "files", "folders"), [("none", 0, 0), ("data", 3, 0), ("full", 3, 5)])
def test_what_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: Any, files: int, folders: int
) -> None:
    synced: list[bool] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.path.isdir(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    from fastload.saver import save_checkpoint

    # Files: weights, config and journal. Folders: the new one three times, and the two in which something was made.
    save_checkpoint(weights(), tmp_path / "a" / "b", extra_files={"config.json": "{}"}, durability=durability)
    assert (synced.count(False), synced.count(True)) == (files, folders)


def test_unknown_durability_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not a durability"):
        save_state_dict(weights(), tmp_path, durability="most")  # type: ignore[arg-type]


# Where renames are refused, and while others read.


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.ENOTSUP], ids=errno.errorcode.get)
def test_file_system_without_renames_is_saved_to_by_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save_state_dict(weights(1), tmp_path, max_shard_size="10KB")
    mapped = load_state_dict(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    save_state_dict(weights(2), tmp_path, max_shard_size="20KB")
    assert sorted(os.listdir(tmp_path)) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    found = load_state_dict(tmp_path, verify=True)
    assert all(same_bytes(found[key], tensor) for key, tensor in weights(2).items())
    assert all(same_bytes(mapped[key], tensor) for key, tensor in weights(1).items())


def test_copies_that_fail_half_way_leave_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastload.errors import SaveError
    from fastload.storage import atomic

    save_state_dict(weights(1), tmp_path, max_shard_size="10KB")
    copy, n_copies = atomic._copy, 0

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def stop(*arguments: Any) -> None:
        nonlocal n_copies
        n_copies += 1
        if n_copies == 3:
            Path(arguments[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        patch.setattr(atomic, "_copy", stop)
        with pytest.raises(SaveError, match="the new checkpoint is complete"):
            save_state_dict(weights(2), tmp_path, max_shard_size="10KB")
    assert JOURNAL_NAME in os.listdir(tmp_path)
    found = load_state_dict(tmp_path, verify=True)
    assert all(same_bytes(found[key], tensor) for key, tensor in weights(2).items())
    save_state_dict(weights(3), tmp_path, max_shard_size="10KB")
    assert JOURNAL_NAME not in os.listdir(tmp_path)


def test_readers_see_the_old_or_the_new_checkpoint_while_it_is_saved_again_and_again(tmp_path: Path) -> None:
    sizes = ["1GB", "20KB", "10KB"]
    save_state_dict(weights(0), tmp_path)
    is_over = threading.Event()
    failures: list[BaseException] = []

    def save() -> None:
        try:
            for value in range(1, 40):
                save_state_dict(weights(value), tmp_path, max_shard_size=sizes[value % 3], durability="none")
        except BaseException as error:  # noqa: BLE001  told by the test
            failures.append(error)
        finally:
            is_over.set()

    saver = threading.Thread(target=save)
    saver.start()
    seen = set()
    while not is_over.is_set():
        found = load_state_dict(tmp_path)
        firsts = {float(found[key][0]) - i for i, key in enumerate(sorted(found))}
        assert len(found) == 4
        assert len(firsts) == 1
        seen |= firsts
    saver.join()
    assert not failures
    assert len(seen) > 1


def test_opened_checkpoint_is_the_old_one_after_a_save(tmp_path: Path) -> None:
    save_state_dict(weights(1), tmp_path)
    checkpoint = fastload.open_checkpoint(tmp_path)
    save_state_dict({"another": torch.zeros(1)}, tmp_path)
    assert same_bytes(checkpoint["d.weight"], weights(1)["d.weight"])


def test_folder_that_never_rests_is_an_error(tmp_path: Path) -> None:
    from fastload.errors import UnreadableFileError

    count = 0

    def read() -> None:
        nonlocal count
        count += 1
        (tmp_path / "config.json").write_text(json.dumps({"n": "x" * count}))

    with pytest.raises(UnreadableFileError, match="replaced faster"):
        read_steadily(tmp_path, read)


@pytest.mark.parametrize("subfolder", ["", "below"])
def test_folder_that_changes_while_it_is_read_is_read_again(tmp_path: Path, subfolder: str) -> None:
    folder = tmp_path / subfolder
    save_state_dict(weights(1), folder)
    for name in (folder / "model.safetensors", folder):
        os.utime(name, (1e9, 1e9))  # as it was left long ago
    read: list[bytes] = []

    def read_and_save() -> None:
        read.append((folder / "model.safetensors").read_bytes())
        if len(read) == 1:
            save_state_dict(weights(2), folder)

    read_steadily(tmp_path, read_and_save, subfolder=subfolder)
    assert len(read) == 2
    assert read[0] != read[1]


def test_what_is_no_path_is_read_once_whatever_changes_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read: list[int] = []

    def read_and_write() -> None:
        read.append(1)
        (tmp_path / "config.json").write_text("{}" * len(read))

    read_steadily("owner/name", read_and_write)
    read_steadily("name", read_and_write)
    assert len(read) == 2


def test_text_that_is_no_checksums_is_passed_over(tmp_path: Path) -> None:
    assert checksums.read_checksums("f", b"", {"fastload.checksums": "sha-512 1 2 3"}, []) is None
