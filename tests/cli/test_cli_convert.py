"""fastload convert: formats, shards, dtypes; what goes along; what is left when it fails."""

from __future__ import annotations

import errno
import json
import os
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastload import AutoModel, open_checkpoint
from fastload.storage.memory import private_bytes

Command = Callable[..., Any]


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for key, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[key].dtype, b[key].shape), key
        flat_a, flat_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, b[key]))
        assert torch.equal(flat_a, flat_b), key


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, read by the official libraries from whichever files there are."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            found |= load_file(path)
        elif path.suffix == ".bin":
            found |= torch.load(path, weights_only=True)
    return found


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_safetensors_to_bin_and_back_is_bit_identical(
    command: Command, write_safetensors: Callable[..., Path], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    source = write_safetensors(tensors)
    assert command("convert", source, tmp_path / "bin", "--to", "bin").status == 0
    assert names(tmp_path / "bin") == ["pytorch_model.bin"]
    assert_same(contents(tmp_path / "bin"), tensors)
    assert command("convert", tmp_path / "bin", tmp_path / "back").status == 0
    assert names(tmp_path / "back") == ["model.safetensors"]
    assert_same(contents(tmp_path / "back"), tensors)


@pytest.mark.parametrize("target", ["safetensors", "bin"])
def test_a_checkpoint_is_divided_and_joined(command: Command, bert: Path, tmp_path: Path, target: str) -> None:
    before = contents(bert)
    done = command("convert", bert, tmp_path / "shards", "--to", target, "--max-shard-size", "10kB")
    assert done.status == 0
    shards = [name for name in names(tmp_path / "shards") if "-of-" in name]
    assert len(shards) == 3
    assert all(f"wrote     {name}" in done.out for name in shards)
    assert_same(contents(tmp_path / "shards"), before)
    assert command("convert", tmp_path / "shards", tmp_path / "one").status == 0
    assert names(tmp_path / "one") == ["config.json", "model.safetensors"]
    assert_same(contents(tmp_path / "one"), before)


def test_a_cast_changes_floats_alone_and_equals_torchs(
    command: Command, write_safetensors: Callable[..., Path], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert command("convert", write_safetensors(tensors), tmp_path / "out", "--dtype", "bf16").status == 0
    cast = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    assert_same(contents(tmp_path / "out"), cast)


def test_the_config_tells_the_new_dtype(command: Command, bert: Path, tmp_path: Path) -> None:
    values = json.loads((bert / "config.json").read_text())
    old = {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "quantization_config": {"dtype": "float32"}}
    (bert / "config.json").write_text(json.dumps(values | old))
    assert command("convert", bert, tmp_path / "out", "--dtype", "fp16").status == 0
    changed = json.loads((tmp_path / "out" / "config.json").read_text())
    assert changed["dtype"] == changed["torch_dtype"] == changed["text_config"]["dtype"] == "float16"
    assert changed["quantization_config"] == {"dtype": "float32"}
    assert changed["hidden_size"] == values["hidden_size"]
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_a_config_that_names_no_dtype_gets_one(command: Command, bert: Path, tmp_path: Path) -> None:
    values = json.loads((bert / "config.json").read_text())
    del values["dtype"]
    (bert / "config.json").write_text(json.dumps(values))
    assert command("convert", bert, tmp_path / "same").status == 0
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == values
    assert command("convert", bert, tmp_path / "short", "--dtype", "bf16").status == 0
    assert json.loads((tmp_path / "short" / "config.json").read_text()) == values | {"dtype": "bfloat16"}


def test_the_tokenizer_goes_along_and_other_weights_do_not(command: Command, bert: Path, tmp_path: Path) -> None:
    (bert / "tokenizer.json").write_bytes(b'{"\xc3\xa9": 1}\r\n')
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text("{}")
    (bert / "onnx").mkdir()
    for name in ("onnx/model.onnx", "tf_model.h5", "training_args.bin", ".hidden", "model.fp16.safetensors"):
        (bert / name).write_bytes(b"x")
    out = tmp_path / "out"
    done = command("convert", bert, out)
    assert names(out) == ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert (out / "tokenizer.json").read_bytes() == b'{"\xc3\xa9": 1}\r\n'
    values = command("convert", bert, out, "--json").values
    assert values["copied"] == ["tokenizer.json", "1_Pooling/config.json"]
    assert values["left_out"] == ["model.fp16.safetensors", "tf_model.h5", "training_args.bin", "onnx/model.onnx"]
    assert "left out  onnx/model.onnx" in done.out


def test_a_file_brings_nothing_along_but_its_config(command: Command, bert: Path, tmp_path: Path) -> None:
    (bert / "unrelated.txt").write_text("x")
    assert command("convert", bert / "model.safetensors", tmp_path / "out", "--to", "bin").status == 0
    assert names(tmp_path / "out") == ["config.json", "pytorch_model.bin"]


def test_converting_in_place_leaves_one_checkpoint(command: Command, bert: Path) -> None:
    before = contents(bert)
    (bert / "tokenizer.json").write_text("{}")
    assert command("convert", bert, bert, "--to", "bin").status == 0
    assert names(bert) == ["config.json", "pytorch_model.bin", "tokenizer.json"]
    assert_same(contents(bert), before)
    assert command("convert", bert, bert, "--dtype", "bf16", "--max-shard-size", "8kB").status == 0
    assert "pytorch_model.bin" not in names(bert)
    assert_same(contents(bert), {key: tensor.bfloat16() for key, tensor in before.items()})
    assert AutoModel.from_pretrained(bert).dtype == torch.bfloat16
    assert command("verify", bert).status == 0


def test_the_result_may_lie_in_the_folder_it_is_made_from(command: Command, bert: Path) -> None:
    for _ in range(2):
        assert command("convert", bert, bert / "bin", "--to", "bin").status == 0
    assert names(bert) == ["bin/config.json", "bin/pytorch_model.bin", "config.json", "model.safetensors"]


def test_a_variant_stays_one(command: Command, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "model.fp16.safetensors")
    assert command("convert", tmp_path, tmp_path, "--variant", "fp16", "--to", "bin").status == 0
    assert names(tmp_path) == ["model.safetensors", "pytorch_model.fp16.bin"]


@pytest.mark.parametrize("dtype", [(), ("--dtype", "bf16")])
def test_tied_tensors_are_stored_once_and_keep_both_names(
    command: Command, tmp_path: Path, dtype: tuple[str, ...]
) -> None:
    tied = torch.randn(50, 50)
    source = tmp_path / "source"
    source.mkdir()
    torch.save({"embedding": tied, "head": tied}, source / "pytorch_model.bin")
    done = command("convert", source, tmp_path / "safe", "--json", *dtype)
    assert done.values["n_tensors"] == 1
    assert command("convert", tmp_path / "safe", tmp_path / "bin", "--to", "bin").status == 0
    back = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == {"embedding", "head"}
    assert back["embedding"].data_ptr() == back["head"].data_ptr()
    assert torch.equal(back["head"], tied.to(back["head"].dtype))


def test_what_a_header_says_is_kept(command: Command, tmp_path: Path, write_safetensors: Callable[..., Path]) -> None:
    source = write_safetensors({"w": torch.zeros(1)}, {"format": "pt", "author": "a person"})
    assert command("convert", source, tmp_path / "out", "--dtype", "fp16").status == 0
    assert open_checkpoint(tmp_path / "out").metadata == {"format": "pt", "author": "a person"}


def test_compressed_entries_are_converted(command: Command, tmp_path: Path) -> None:
    before = {"w": torch.arange(1000.0), "n": torch.arange(10)}
    torch.save(before, tmp_path / "stored.zip")
    with (
        zipfile.ZipFile(tmp_path / "stored.zip") as stored,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    assert command("convert", tmp_path / "pytorch_model.bin", tmp_path / "out").status == 0
    assert_same(contents(tmp_path / "out"), before)


@pytest.mark.parametrize("dtype", [(), ("--dtype", "bf16")])
def test_converting_takes_little_memory(command: Command, tmp_path: Path, dtype: tuple[str, ...]) -> None:
    if private_bytes() is None:
        pytest.skip("this system does not say how much memory a process has")
    source = tmp_path / "source"
    source.mkdir()
    save_file({f"layer.{n}.weight": torch.full((1000, 1000), 1.5) for n in range(40)}, source / "model.safetensors")
    command("convert", source, tmp_path / "warm", "--max-shard-size", "20MB", *dtype)
    peaks = [0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            peaks.append(private_bytes() or 0)

    watcher = threading.Thread(target=watch)
    before = private_bytes() or 0
    watcher.start()
    status = command("convert", source, tmp_path / "out", "--max-shard-size", "20MB", *dtype).status
    stop.set()
    watcher.join()
    assert status == 0
    # 160 MB are read, and 160 or 80 written.
    assert max(peaks) - before < 24e6


def test_a_full_disk_leaves_the_old_checkpoint(command: Command, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(bert)

    def no_room(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    done = command("convert", bert, bert, "--dtype", "bf16")
    assert done.status == 1
    assert "No space left on device" in done.err
    assert names(bert) == ["config.json", "model.safetensors"]
    assert_same(contents(bert), before)


def test_a_target_that_is_a_file_is_refused(command: Command, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = command("convert", bert, tmp_path / "file", "--dtype", "bf16")
    assert done.status == 1
    assert str(tmp_path / "file") in done.err
