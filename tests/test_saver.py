"""Saving: what other libraries read of it, what it leaves behind, and that a failure harms nothing."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_model

from fastload.dtypes import DTYPES, to_torch
from fastload.errors import OptionError, SaveError, UnknownDtypeError
from fastload.loader import load_state_dict
from fastload.saver import SaveReport, save_checkpoint, save_state_dict
from fastload.sources.journal import JOURNAL_NAME, Journal, encode_journal
from fastload.storage.memory import private_bytes
from tests.conftest import same_bytes, without_checksums

Tensors = dict[str, torch.Tensor]
FORMATS = pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])


def weights(value: float = 1.0) -> Tensors:
    return {f"{name}.weight": torch.full((100,), float(value)) for name in "abcd"}


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def load_officially(folder: Path) -> Tensors:
    """All tensors of a folder's files, read by safetensors or torch."""
    found: Tensors = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        elif path.suffix == ".bin":
            found |= torch.load(path, weights_only=True)
    return found


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert same_bytes(found[key], tensor.detach().resolve_conj().resolve_neg()), key


def every_dtype() -> Tensors:
    tensors: Tensors = {}
    for dtype in DTYPES.values():
        if hasattr(torch, dtype.torch_name or "") and dtype.code != "C128":
            raw = torch.randint(0, 2 if dtype.code == "BOOL" else 256, (6, 16), dtype=torch.uint8)
            tensors[dtype.code] = raw.view(to_torch(dtype))
            tensors[f"{dtype.code}.empty"] = torch.empty(0, 3, dtype=to_torch(dtype))
            if dtype.elements_per_item == 1:
                tensors[f"{dtype.code}.scalar"] = raw.view(to_torch(dtype))[0, 0]
    return tensors


# What is in the files.


@FORMATS
@pytest.mark.parametrize("max_shard_size", ["1GB", "200B"])
def test_official_libraries_read_every_dtype(tmp_path: Path, safe: bool, max_shard_size: str) -> None:
    tensors = every_dtype()
    save_state_dict(tensors, tmp_path, safe_serialization=safe, max_shard_size=max_shard_size)
    assert_same(load_officially(tmp_path), tensors)


@FORMATS
def test_fastload_reads_what_it_saved(tmp_path: Path, safe: bool) -> None:
    tensors = every_dtype()
    for max_shard_size in ("1GB", "200B"):
        save_state_dict(tensors, tmp_path, safe_serialization=safe, max_shard_size=max_shard_size)
        assert_same(load_state_dict(tmp_path), tensors)


@FORMATS
def test_views_and_parameters_are_saved_by_value(tmp_path: Path, safe: bool) -> None:
    base = torch.randn(50, 40)
    tensors = {
        "transposed": base.t(),
        "strided": base[::3, 5:20:2],
        "expanded": torch.ones(1).expand(7),
        "flipped sign": torch.randn(3, dtype=torch.complex64).conj().imag,
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "computed": torch.nn.Parameter(torch.randn(3)) * 2,
    }
    save_state_dict(tensors, tmp_path, safe_serialization=safe)
    found = load_officially(tmp_path)
    assert_same(found, tensors)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_safetensors_names_its_format_for_transformers(tmp_path: Path) -> None:
    save_state_dict(weights(), tmp_path, metadata={"step": "7"})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert without_checksums(file.metadata()) == {"format": "pt", "step": "7"}


@pytest.mark.parametrize("max_shard_size", ["1KB", "3KB", "10KB"])
def test_shards_are_those_of_huggingface_hub(tmp_path: Path, max_shard_size: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 600, (40,), generator=generator).tolist()
    tensors = {f"{i}.weight": torch.randn(size) for i, size in enumerate(sizes)}
    expected = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    report = save_state_dict(tensors, tmp_path, max_shard_size=max_shard_size)
    assert [*report.files[:-1]] == [*expected.filename_to_tensors]
    for name, keys in expected.filename_to_tensors.items():
        assert load_file(tmp_path / name).keys() == set(keys)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == expected.tensor_to_filename
    assert without_checksums(index["metadata"]) == {"total_parameters": sum(sizes), "total_size": 4 * sum(sizes)}


@FORMATS
def test_variant_stands_in_every_name(tmp_path: Path, safe: bool) -> None:
    save_state_dict(weights(), tmp_path / "one", variant="fp16", safe_serialization=safe)
    save_state_dict(weights(), tmp_path / "two", variant="fp16", safe_serialization=safe, max_shard_size=800)
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    assert files(tmp_path / "one") == [f"{stem}.fp16.{suffix}"]
    shards = [f"{stem}.fp16-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    assert files(tmp_path / "two") == sorted([*shards, f"{stem}.{suffix}.index.fp16.json"])
    assert_same(load_state_dict(tmp_path / "two", variant="fp16"), weights())


def test_same_state_dict_makes_the_same_bytes(tmp_path: Path) -> None:
    for safe in (True, False):
        for name in ("one", "two"):
            save_state_dict(weights(), tmp_path / name, safe_serialization=safe, max_shard_size=800)
        assert files(tmp_path / "one") == files(tmp_path / "two")
        assert all(p.read_bytes() == (tmp_path / "two" / p.name).read_bytes() for p in (tmp_path / "one").iterdir())


def test_no_tensors_are_a_checkpoint_too(tmp_path: Path) -> None:
    save_state_dict({}, tmp_path)
    assert load_file(tmp_path / "model.safetensors") == {}


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, buffers: writev(fd, [memoryview(buffers[0])[:777]]))
    tensors = {f"{i}": torch.randn(5 * i + 1) for i in range(100)} | {"large": torch.randn(50_000)}
    written: list[int] = []
    report = save_state_dict(tensors, tmp_path, progress=written.append)
    assert_same(load_officially(tmp_path), tensors)
    assert max(written) <= 777
    assert sum(written) > report.n_bytes


def test_saving_takes_no_memory_of_the_size_of_the_model(tmp_path: Path) -> None:
    before = private_bytes()
    if before is None:
        pytest.skip("this kernel does not tell the anonymous memory of a process")
    tensors = {f"{i}": torch.zeros(4 << 20, dtype=torch.uint8) for i in range(32)}
    tensors = {key: tensor.add_(1) for key, tensor in tensors.items()}
    before, growth = private_bytes() or 0, 0

    def watch(_: int) -> None:
        nonlocal growth
        growth = max(growth, (private_bytes() or 0) - before)

    save_state_dict(tensors, tmp_path, progress=watch)
    save_state_dict(tensors, tmp_path, progress=watch, safe_serialization=False)
    assert growth < 32 << 20


# Memory that tensors share.


def test_tied_tensors_are_stored_once_and_noted(tmp_path: Path) -> None:
    shared = torch.randn(10, 4)
    tensors = {"decoder.weight": shared, "embeddings.weight": shared, "other": torch.randn(3)}
    report = save_checkpoint(tensors, tmp_path, tied={"decoder.weight": "embeddings.weight"})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {"embeddings.weight", "other"}
        assert without_checksums(file.metadata()) == {"format": "pt", "decoder.weight": "embeddings.weight"}
    assert (report.n_tensors, report.n_bytes) == (2, 172)
    assert_same(load_state_dict(tmp_path), tensors)


def test_first_name_is_kept_where_nothing_says_which(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.first = torch.nn.Linear(3, 3)
    module.second = module.first
    save_state_dict(module.state_dict(), tmp_path)
    save_model(module, tmp_path / "official.safetensors")
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "official.safetensors", "pt") as official,
    ):
        assert set(ours.keys()) == set(official.keys()) == {"first.weight", "first.bias"}
        official_notes = official.metadata()
        assert {key: ours.metadata()[key] for key in official_notes} == official_notes


def test_name_of_a_tied_tensor_that_the_metadata_uses_is_stored_again(tmp_path: Path) -> None:
    shared = torch.randn(4)
    save_state_dict({"a": shared, "format": shared, "step": shared}, tmp_path, metadata={"step": "7"})
    assert load_file(tmp_path / "model.safetensors").keys() == {"a", "format", "step"}


def test_tie_that_does_not_hold_drops_nothing(tmp_path: Path) -> None:
    tensors = {"decoder.weight": torch.zeros(4), "embeddings.weight": torch.ones(4)}
    save_checkpoint(tensors, tmp_path, tied={"decoder.weight": "embeddings.weight", "absent": "decoder.weight"})
    assert_same(load_officially(tmp_path), tensors)


def test_tied_name_is_noted_in_the_shard_of_the_kept_one(tmp_path: Path) -> None:
    shared = torch.randn(100)
    tensors = {"a": torch.randn(100), "b": shared, "c": torch.randn(100), "d": shared}
    save_state_dict(tensors, tmp_path, max_shard_size=400)
    notes = []
    for number in (1, 2, 3):
        with safe_open(tmp_path / f"model-0000{number}-of-00003.safetensors", "pt") as file:
            notes.append(without_checksums(file.metadata()))
    assert notes == [{"format": "pt"}, {"format": "pt", "d": "b"}, {"format": "pt"}]
    assert_same(load_state_dict(tmp_path), tensors)


@FORMATS
def test_tensors_that_overlap_are_each_whole(tmp_path: Path, safe: bool) -> None:
    base = torch.randn(20, 10)
    raw = torch.arange(64, dtype=torch.uint8)
    tensors = {
        "base": base,
        "row": base[3],
        "transposed": base.t(),
        "rows": base[2:5],
        "bytes": raw[2:],
        "halves": raw.view(torch.float16)[1:],
        "words": raw.view(torch.int32)[1:],
    }
    save_state_dict(tensors, tmp_path, safe_serialization=safe)
    assert_same(load_officially(tmp_path), tensors)
    assert_same(load_state_dict(tmp_path), tensors)


def test_bin_keeps_sharing_and_puts_what_shares_in_one_shard(tmp_path: Path) -> None:
    base = torch.randn(100)
    tensors = {"a": base, "b": torch.randn(100), "c": base[10:20], "d": base}
    report = save_state_dict(tensors, tmp_path, safe_serialization=False, max_shard_size=400)
    assert report.n_bytes == 800
    shard = torch.load(tmp_path / "pytorch_model-00001-of-00002.bin", weights_only=True)
    assert [*shard] == ["a", "c", "d"]
    shard["a"][15] = 7
    assert shard["c"][5] == shard["d"][15] == 7


def test_small_view_of_a_large_storage_makes_a_small_bin(tmp_path: Path) -> None:
    large = torch.randn(1_000_000)
    tensors = {"a": large[500_001:500_011], "b": large[500_005:500_020], "c": large[900_000:900_000], "d": large[7]}
    report = save_state_dict(tensors, tmp_path, safe_serialization=False)
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 5_000
    assert report.n_bytes == 4 * (19 + 1)
    found = load_officially(tmp_path)
    assert_same(found, tensors)
    found["a"][5] = 7
    assert found["b"][1] == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@FORMATS
def test_cuda_tensors_are_saved_as_cpu_tensors(tmp_path: Path, safe: bool) -> None:
    base = torch.randn(40, 30, device="cuda")
    tensors = {"a": base, "tied": base, "row": base[2], "b": torch.randn(3, device="cuda").half(), "c": torch.ones(2)}
    save_state_dict(tensors, tmp_path, safe_serialization=safe)
    found = load_state_dict(tmp_path)
    assert all(tensor.device.type == "cpu" for tensor in found.values())
    assert_same(found, {key: tensor.cpu() for key, tensor in tensors.items()})


# Together with transformers.


@FORMATS
@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_transformers_loads_what_was_saved(tmp_path: Path, safe: bool, max_shard_size: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=37, architectures=["BertForMaskedLM"])
    model = transformers.BertForMaskedLM(config).eval()
    save_checkpoint(
        model.state_dict(),
        tmp_path,
        safe_serialization=safe,
        max_shard_size=max_shard_size,
        extra_files={"config.json": config.to_json_string()},
        tied=model.all_tied_weights_keys,
    )
    loaded, info = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


# What was in the folder before.


@FORMATS
def test_files_of_earlier_saves_are_removed_and_others_are_not(tmp_path: Path, safe: bool) -> None:
    others = ["README.md", "model.safetensors.backup", "model-of-mine.bin", "adapter_model.safetensors", "vocab.txt"]
    for name in others:
        (tmp_path / name).write_text(name)
    save_state_dict(weights(), tmp_path, variant="fp16", max_shard_size=800)
    kept = files(tmp_path)
    for max_shard_size, first in ((1600, True), (400, False), (800, True), (800, False), (1600, False), (400, True)):
        report = save_state_dict(weights(), tmp_path, max_shard_size=max_shard_size, safe_serialization=first)
        assert files(tmp_path) == sorted([*kept, *report.files])
    report = save_state_dict(weights(2), tmp_path, safe_serialization=safe)
    assert files(tmp_path) == sorted([*kept, *report.files])
    shards = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [*report.removed] == [*shards, "model.safetensors.index.json"]
    assert_same(load_state_dict(tmp_path), weights(2))
    assert_same(load_state_dict(tmp_path, variant="fp16"), weights())


@FORMATS
def test_the_folder_that_the_tensors_are_mapped_from_can_be_saved_to(tmp_path: Path, safe: bool) -> None:
    save_state_dict(weights(3), tmp_path)
    with open(tmp_path / "model.safetensors", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensor = torch.frombuffer(mapped, dtype=torch.float32, offset=4096, count=100)
    tensors = load_state_dict(tmp_path)
    tensors["b.weight"].add_(1)
    save_state_dict({**tensors, "e.weight": tensor}, tmp_path, safe_serialization=safe)
    expected = {**weights(3), "b.weight": torch.full((100,), 4.0), "e.weight": torch.full((100,), 3.0)}
    assert_same(load_state_dict(tmp_path), expected)
    assert_same(tensors, {key: expected[key] for key in tensors})
    assert torch.equal(tensor, torch.full((100,), 3.0))


@FORMATS
def test_link_is_replaced_and_its_target_left_alone(tmp_path: Path, safe: bool) -> None:
    name = "model.safetensors" if safe else "pytorch_model.bin"
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "blob")
    save_state_dict(weights(), tmp_path / "out", safe_serialization=safe)
    assert (tmp_path / "blob").read_text() == "shared"
    assert not (tmp_path / "out" / name).is_symlink()


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(
    tmp_path: Path, umask: Callable[[int], int], mask: int, mode: int
) -> None:
    umask(mask)
    for safe in (True, False):
        folder = tmp_path / str(safe)
        save_checkpoint(
            weights(), folder, safe_serialization=safe, max_shard_size=800, extra_files={"config.json": "{}"}
        )
        assert len(files(folder)) == 4
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}


def test_folder_is_made_with_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = save_state_dict(weights(), "a/b/c")
    assert report.folder == "a/b/c"
    assert_same(load_state_dict(tmp_path / "a" / "b" / "c"), weights())


def test_saves_into_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    def save(value: int) -> None:
        save_state_dict(weights(value), tmp_path, max_shard_size=(1600, 800, 400)[value % 3], durability="none")

    threads = [threading.Thread(target=save, args=(value,)) for value in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {value for tensor in load_state_dict(tmp_path).values() for value in tensor.tolist()}
    assert len(found) == 1
    count = (1, 3, 5)[int(found.pop()) % 3]
    assert len(files(tmp_path)) == count


def test_report_says_what_was_done(tmp_path: Path) -> None:
    save_state_dict(weights(), tmp_path)
    report = save_state_dict(weights(), tmp_path, max_shard_size=800)
    shards = tuple(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    names = (*shards, "model.safetensors.index.json")
    assert report == SaveReport(str(tmp_path), names, 4, 1600, report.seconds, ("model.safetensors",))
    assert re.fullmatch(
        r"saved 4 tensors, 0.0 MB in 3 files to .* in [0-9.]+ s, removed model.safetensors", str(report)
    )


# Failures.


@pytest.fixture
def limited_file_size() -> Iterator[Callable[[int], None]]:
    """Has writing beyond a size fail, as a full disk does. Python ignores the signal that would come first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@FORMATS
def test_disk_that_fills_up_leaves_the_old_checkpoint(
    tmp_path: Path, safe: bool, limited_file_size: Callable[[int], None]
) -> None:
    save_checkpoint(weights(1), tmp_path, extra_files={"config.json": "old"})
    before = files(tmp_path)
    tensors = weights(2) | {"large": torch.randn(200_000)}
    limited_file_size(100_000)
    with pytest.raises(SaveError, match="could not be written: File too large") as caught:
        save_checkpoint(
            tensors, tmp_path, safe_serialization=safe, max_shard_size=800_000, extra_files={"config.json": "new"}
        )
    assert caught.value.errno is None
    assert re.search(r"model-00002-of-00002\.(safetensors|bin)$", str(caught.value.file))
    assert files(tmp_path) == before
    assert (tmp_path / "config.json").read_text() == "old"
    assert_same(load_state_dict(tmp_path), weights(1))


@pytest.mark.parametrize("call", ["open", "writev", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@FORMATS
def test_refusal_of_the_system_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, safe: bool
) -> None:
    save_state_dict(weights(1), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), OSError(number, os.strerror(number))))
        with pytest.raises(SaveError, match=re.escape(os.strerror(number))) as caught:
            save_state_dict(weights(2), tmp_path, safe_serialization=safe, max_shard_size=800)
    assert caught.value.fix
    assert str(tmp_path) in str(caught.value.file)
    assert files(tmp_path) == ["model.safetensors"]
    assert_same(load_state_dict(tmp_path), weights(1))


def failing(original: Callable[..., Any], error: BaseException, after: int = 0) -> Callable[..., Any]:
    """The call, but where it would write it raises once it did so ``after`` times."""
    count = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if original.__name__ == "open" and not args[1] & os.O_CREAT:
            return original(*args, **kwargs)
        count += 1
        if count > after:
            raise error
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("call", ["writev", "replace"])
@FORMATS
def test_interrupted_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, safe: bool
) -> None:
    save_state_dict(weights(1), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_state_dict(weights(2), tmp_path, safe_serialization=safe, max_shard_size=800)
    assert files(tmp_path) == ["model.safetensors"]
    assert_same(load_state_dict(tmp_path), weights(1))


def test_failure_among_the_renames_leaves_the_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state_dict(weights(1), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace, OSError(errno.EIO, "Input/output error"), after=2))
        with pytest.raises(SaveError, match="the new checkpoint is complete"):
            save_state_dict(weights(2), tmp_path, max_shard_size=800)
    assert JOURNAL_NAME in files(tmp_path)
    assert_same(load_state_dict(tmp_path), weights(2))
    save_state_dict({}, tmp_path, variant="other")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert files(tmp_path) == sorted([*shards, "model.other.safetensors", "model.safetensors.index.json"])
    assert_same(load_officially(tmp_path), weights(2))


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_save_killed_at_any_step_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, file_format: str) -> None:
    program = Path(__file__).with_name("killed_save.py")
    run = [sys.executable, str(program), str(tmp_path / "out"), file_format]
    environment = {**os.environ, "PYTHONPATH": str(program.parents[1])}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) > 25
    generations = [result["after_kill"] for result in results]
    assert set(generations) == {1, 2}
    assert generations == sorted(generations), "the new checkpoint was there, and then the old one again"
    for result in results:
        assert result["after_next_save"] == 4, result
        assert not [name for name in result["files"] if name.startswith(".fastload")], result
        assert len(result["files"]) == 4, result


def test_damaged_journal_is_replaced(tmp_path: Path) -> None:
    save_state_dict(weights(1), tmp_path)
    (tmp_path / JOURNAL_NAME).write_text("{")
    (tmp_path / ".fastload-tmp-0-model.safetensors").write_text("perhaps the only copy")
    with pytest.raises(OptionError):
        save_state_dict({"a": 1}, tmp_path)  # type: ignore[dict-item]
    assert len(files(tmp_path)) == 3
    save_state_dict(weights(2), tmp_path)
    assert_same(load_state_dict(tmp_path), weights(2))


def test_journal_of_a_stranger_moves_and_removes_no_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "thesis.bin").write_text("mine")
    journal = Journal({"model.safetensors": "notes.txt"}, ("thesis.bin", "notes.txt", "model-gone.safetensors"))
    (tmp_path / JOURNAL_NAME).write_text(encode_journal(journal))
    save_state_dict(weights(), tmp_path)
    assert files(tmp_path) == ["model.safetensors", "notes.txt", "thesis.bin"]


# Refused before anything is touched. Each names what is wrong.


def refused(tmp_path: Path, tensors: Any, error: type[Exception] = OptionError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        save_checkpoint(tensors, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_tensors_without_values_are_refused_all_by_name(tmp_path: Path) -> None:
    tensors = {"a": torch.empty(2, device="meta"), "b": torch.empty(2), "c": torch.empty(0, device="meta")}
    message = refused(tmp_path, tensors, SaveError)
    assert "2 tensors are on the meta device" in message
    assert "a, c" in message


def test_what_is_no_tensor_or_has_no_name_is_refused_all_by_name(tmp_path: Path) -> None:
    message = refused(tmp_path, {3: torch.ones(1), "extra": {"step": 1}, "b": torch.ones(1), ("t",): torch.ones(1)})
    assert "3 is no text" in message
    assert "'extra' is no tensor but dict" in message
    assert "('t',) is no text" in message


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's, of making such tensors
def test_sparse_nested_and_quantised_tensors_are_refused(tmp_path: Path) -> None:
    tensors = {
        "coo": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    }
    message = refused(tmp_path, tensors)
    for key in ("coo", "csr", "nested"):
        assert f"'{key}' is sparse or nested" in message
    assert "'quantised' is quantised" in message


def test_tensor_subclass_that_only_stands_for_tensors_is_refused(tmp_path: Path) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    assert "'a' is of TwoTensor" in refused(tmp_path, {"a": TwoTensor(torch.ones(2), torch.ones(2))})


def test_tensor_whose_memory_was_released_is_refused(tmp_path: Path) -> None:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    assert "'a' has no memory" in refused(tmp_path, {"a": tensor})


def test_dtype_that_no_format_holds_is_refused(tmp_path: Path) -> None:
    assert "'a' is of torch.uint4" in refused(tmp_path, {"a": torch.empty(2, dtype=torch.uint4)})


def test_dtype_that_only_bin_holds_is_refused_as_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "z": torch.ones(2, dtype=torch.complex128)}
    assert ".bin" in refused(tmp_path, tensors, UnknownDtypeError, max_shard_size=8)
    save_state_dict(tensors, tmp_path, safe_serialization=False)
    assert_same(load_officially(tmp_path), tensors)


@pytest.mark.parametrize(
    "options",
    [
        {"max_shard_size": "5 gigabytes"},
        {"variant": "../up"},
        {"variant": ""},
        {"metadata": {"a": "b"}, "safe_serialization": False},
        {"metadata": {"a": 1}},
        {"extra_files": {"../config.json": ""}},
        {"extra_files": {"": ""}},
        {"extra_files": {JOURNAL_NAME: ""}},
        {"extra_files": {"model.safetensors": ""}},
        {"extra_files": {"config.json": "\ud800"}},
    ],
    ids=str,
)
def test_option_that_cannot_be_meant_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    refused(tmp_path, weights(), **options)


@pytest.mark.parametrize("key", ["__metadata__", "\udc00"], ids=["reserved", "half a character"])
def test_key_that_safetensors_cannot_hold_is_refused(tmp_path: Path, key: str) -> None:
    refused(tmp_path, {key: torch.ones(1)})


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SaveError) as caught:
            save_state_dict(weights(), path)
        assert caught.value.file == str(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(SaveError, match="Is a directory"):
        save_state_dict(weights(), tmp_path)
    assert files(tmp_path) == ["model.safetensors"]
