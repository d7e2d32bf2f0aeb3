"""fastload verify: every way in which a checkpoint can be bad, and good ones."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastload.reports import format_bytes

Command = Callable[..., Any]


def compress(path: Path) -> None:
    """Rewrite the zip of a .bin with its entries deflated."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def flip(path: Path, needle: bytes) -> None:
    """Change one bit of the file, where ``needle`` begins."""
    data = bytearray(path.read_bytes())
    data[data.index(needle)] ^= 1
    path.write_bytes(data)


def kinds(done: Any) -> list[str]:
    assert done.status == 1
    assert done.values["ok"] is False
    return [error["kind"] for error in done.values["errors"]]


def test_a_whole_checkpoint_is_good(command: Command, bert: Path) -> None:
    done = command("verify", bert)
    assert done.status == 0
    assert "39 tensors fill a BertModel" in done.out
    assert done.out.endswith(f"{bert}: OK\n")


def test_the_verdict_is_json_on_request(command: Command, bert: Path) -> None:
    size = format_bytes((bert / "model.safetensors").stat().st_size)
    assert command("verify", bert, "--json").values == {
        "source": str(bert),
        "ok": True,
        "checked": [f"model.safetensors: 39 tensors, {size} compared with checksums", "39 tensors fill a BertModel"],
        "errors": [],
    }


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_bin_is_good_compressed_or_not(command: Command, tmp_path: Path, is_compressed: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.randn(100)}, path)
    if is_compressed:
        compress(path)
    done = command("verify", tmp_path)
    assert done.status == 0
    assert ("1 compressed or big-endian tensors decoded" in done.out) == is_compressed


def test_a_bin_without_checksums_is_good(command: Command, tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.randn(100)}, tmp_path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(before)
    assert command("verify", tmp_path).status == 0


@pytest.mark.parametrize("n_missing", [1, 5000])
def test_a_cut_file_is_bad(command: Command, bert: Path, n_missing: int) -> None:
    path = bert / "model.safetensors"
    os.truncate(path, path.stat().st_size - n_missing)
    done = command("verify", bert)
    assert done.status == 1
    assert "the file ends before its tensors do" in done.out
    assert done.out.endswith(f"{bert}: 1 problem\n")


def test_a_file_that_is_cut_while_it_is_read_is_bad(
    command: Command, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastload.cli import verifying

    def cut_after_the_header(path: str) -> Any:
        contents = read_file(path)
        os.truncate(path, contents.n_file_bytes - 100)
        return contents

    read_file = verifying.read_file
    monkeypatch.setattr(verifying, "read_file", cut_after_the_header)
    assert kinds(command("verify", bert, "--json")) == ["TruncatedFileError"]


def test_a_changed_byte_of_a_bin_is_found_by_its_checksum(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.full((100,), 1.5)}, path)
    flip(path, torch.full((100,), 1.5).numpy().tobytes())
    assert command("load", tmp_path).status == 0  # a load does not take the time to look
    assert kinds(command("verify", tmp_path, "--json")) == ["ArchiveError"]


def test_a_damaged_compressed_entry_is_bad(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.arange(1000.0)}, path)
    compress(path)
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    data = bytearray(path.read_bytes())
    data[entry.header_offset + 200] ^= 0xFF
    path.write_bytes(data)
    assert kinds(command("verify", tmp_path, "--json")) == ["ArchiveError"]


def test_all_bad_shards_are_named_at_once(command: Command, tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.zeros(100)}, tmp_path / name)
    weight_map = {f"w{number}": name for number, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert command("verify", tmp_path).status == 0
    os.truncate(tmp_path / names[0], 90)
    (tmp_path / names[2]).write_bytes(b"")
    done = command("verify", tmp_path, "--json")
    assert kinds(done) == ["TruncatedFileError", "TruncatedFileError"]
    assert [Path(error["file"]).name for error in done.values["errors"]] == [names[0], names[2]]
    (tmp_path / names[0]).unlink()
    assert kinds(command("verify", tmp_path, "--json")) == ["CheckpointNotFoundError"]


def test_a_key_of_the_index_that_no_shard_has_is_bad(command: Command, tmp_path: Path) -> None:
    name = "model-00001-of-00001.safetensors"
    save_file({"w": torch.zeros(3)}, tmp_path / name)
    index = {"metadata": {}, "weight_map": {"w": name, "lost": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert kinds(command("verify", tmp_path, "--json")) == ["IndexFileError"]


def test_a_model_with_missing_weights_is_bad(command: Command, bert: Path) -> None:
    tensors = load_file(bert / "model.safetensors")
    tensors = {key: tensor.clone() for key, tensor in tensors.items() if "pooler" not in key}
    tensors["embeddings.LayerNorm.bias"] = torch.zeros(7)
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    done = command("verify", bert, "--json")
    assert kinds(done) == ["KeyMatchError"]
    (error,) = done.values["errors"]
    assert "pooler.dense.bias is missing" in error["message"]
    assert "embeddings.LayerNorm.bias is [7], the model needs [16]" in error["message"]


def test_surplus_tensors_are_told_and_are_no_fault(command: Command, bert: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(bert / "model.safetensors").items()}
    save_file({**tensors, "surplus": torch.zeros(1)}, bert / "model.safetensors", {"format": "pt"})
    done = command("verify", bert)
    assert done.status == 0
    assert "not in a BertModel: surplus" in done.out


def test_a_pickle_that_calls_something_is_bad(command: Command, tmp_path: Path) -> None:
    class Calls:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "called"),)

    stream = io.BytesIO()
    torch.save({"w": Calls()}, stream)
    (tmp_path / "pytorch_model.bin").write_bytes(stream.getvalue())
    assert kinds(command("verify", tmp_path, "--json")) == ["UnsafePickleError"]
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("text", ["{", '{"model_type": "bert", "hidden_size": "wide"}'])
def test_a_bad_config_is_bad(command: Command, bert: Path, text: str) -> None:
    (bert / "config.json").write_text(text)
    assert kinds(command("verify", bert, "--json")) == ["ConfigError"]


def test_weights_of_a_family_unknown_are_checked_as_far_as_they_can_be(
    command: Command, write_safetensors: Callable[..., Path], tensors: dict[str, torch.Tensor]
) -> None:
    done = command("verify", write_safetensors(tensors))
    assert done.status == 0
    assert "its keys were not checked" in done.out


def test_nothing_there_is_bad(command: Command, tmp_path: Path) -> None:
    assert kinds(command("verify", tmp_path, "--json")) == ["CheckpointNotFoundError"]
