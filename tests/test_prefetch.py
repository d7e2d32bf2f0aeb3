"""Reading ahead as a user and a load ask for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastload
from fastload import prefetching
from fastload.errors import CheckpointNotFoundError, TruncatedFileError
from fastload.placement import network
from fastload.storage.reading import ReadFile
from fastload.storage.residency import FileSystem, Residency
from tests.cold import make_cold, read_bytes, resident, threads, wait_for_no_threads
from tests.conftest import same_bytes

N_LAYERS = 16


class Stack(nn.Module):
    """16 MB in layers of a megabyte."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(512, 512) for _ in range(N_LAYERS)])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    save_file(Stack().state_dict(), tmp_path / "model.safetensors")
    yield tmp_path
    wait_for_no_threads()


@pytest.fixture
def file(folder: Path) -> Path:
    make_cold(folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture
def over_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "file_system", lambda _: FileSystem("nfs", True))
    monkeypatch.setattr(prefetching, "file_system", lambda _: FileSystem("nfs", True))


@pytest.fixture
def stays_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may be wholly cached by the kernel's readahead before the load decides."""
    monkeypatch.setattr(network, "residency", lambda _, exact: Residency(1, 0, True))


def stack() -> Stack:
    with torch.device("meta"):
        return Stack()


def in_fresh_process(script: str, *arguments: Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_prefetch_reads_a_cold_checkpoint(file: Path, folder: Path) -> None:
    reading = fastload.prefetch(folder)
    assert reading.wait(20)
    assert resident(file) == file.stat().st_size
    assert (reading.is_done, reading.error) == (True, None)
    assert "1 thread in reads of 1 MB" in reading.note


def test_prefetch_returns_at_once_and_imports_no_torch(file: Path) -> None:
    script = """
import json, sys, time, fastload
fastload.prefetch
begin = time.perf_counter()
reading = fastload.prefetch(sys.argv[1])
took = time.perf_counter() - begin
done = reading.wait(20)
print(json.dumps({"took": took, "done": done, "torch": "torch" in sys.modules, "numpy": "numpy" in sys.modules}))
"""
    seen = in_fresh_process(script, file)
    assert (seen["done"], seen["torch"], seen["numpy"]) == (True, False, False)
    assert isinstance(seen["took"], float)
    assert seen["took"] < 0.05
    assert resident(file) == file.stat().st_size


def test_prefetch_of_nothing_is_no_error_until_the_load(tmp_path: Path) -> None:
    reading = fastload.prefetch(tmp_path)
    assert reading.wait(10)
    assert isinstance(reading.error, CheckpointNotFoundError)
    assert reading.is_done
    reading.stop()


def test_a_damaged_file_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * (8 << 20))
    make_cold(tmp_path / "model.safetensors")
    reading = fastload.prefetch(tmp_path)
    assert reading.wait(10)
    assert reading.error is None
    wait_for_no_threads()


def test_a_warm_checkpoint_starts_no_reader_and_leaves_no_note(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident(folder / "model.safetensors")
    monkeypatch.setattr(prefetching._Run, "start", lambda _: pytest.fail("a reader was started"))
    reading = fastload.prefetch(folder)
    assert reading.wait(10)
    assert reading.note == ""
    report = fastload.load_model(stack(), folder)
    assert threads() == []
    assert report.notes == ()


def test_a_cold_load_is_right_and_says_what_it_did(file: Path, folder: Path) -> None:
    module = stack()
    report = fastload.load_model(module, folder)
    assert re.match(r"cold: reading ahead about 1\d\.\d MB with \d threads? in reads of \d MB", *report.notes)
    expected = load_file(file)
    assert all(same_bytes(tensor, expected[key]) for key, tensor in module.state_dict().items())


def test_a_cold_state_dict_is_read_ahead_too(file: Path) -> None:
    tensors = fastload.load_state_dict(file)
    assert threads()
    wait_for_no_threads()
    assert resident(file) == file.stat().st_size
    assert len(tensors) == 2 * N_LAYERS


def test_a_file_is_read_by_one_reader_however_many_ask(
    file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = prefetching._read_specs
    monkeypatch.setattr(prefetching, "_read_specs", lambda paths: time.sleep(0.3) or slow(paths))
    before = read_bytes()
    first, second = prefetching.read_ahead([str(file)]), prefetching.read_ahead([str(file)])
    assert first is not None
    assert second is not None
    assert first._runs == second._runs
    link = folder / "link.safetensors"
    os.link(file, link)
    assert prefetching.read_ahead([str(link)])._runs == first._runs  # type: ignore[union-attr]
    report = fastload.load_model(stack(), folder)
    assert report.notes == (first.note,)
    assert first.wait(20)
    assert read_bytes() - before <= 1.1 * file.stat().st_size
    assert prefetching._running == {}


def test_stopping_is_prompt(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = prefetching._read_specs
    monkeypatch.setattr(prefetching, "_read_specs", lambda paths: time.sleep(0.3) or slow(paths))
    reading = fastload.prefetch(file)
    begin = time.monotonic()
    reading.stop()
    assert time.monotonic() - begin < 0.1
    assert reading.wait(10)
    assert all(run._readahead is None for run in reading._runs)


def test_waiting_can_time_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = prefetching._read_specs
    monkeypatch.setattr(prefetching, "_read_specs", lambda paths: time.sleep(0.3) or slow(paths))
    reading = prefetching.read_ahead([str(file)])
    assert reading is not None
    assert not reading.wait(0.01)
    assert not reading.is_done
    assert reading.wait(20)


def test_no_more_than_free_memory_is_read_and_the_note_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastload.storage.readahead.available_bytes", lambda: (256 << 20) + (4 << 20))
    reading = prefetching.read_ahead([str(file)])
    assert reading is not None
    assert re.search(r"reading ahead about 4.2 MB \(of 1\d.\d MB: as much as free memory holds\)", reading.note)
    assert reading.wait(20)


def test_where_no_thread_can_be_had_the_load_goes_on(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", refuse)
        report = fastload.load_model(stack(), folder)
    assert report.notes == ()
    assert prefetching._running == {}


def test_a_forked_child_joins_no_reader_of_its_parent(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = prefetching._read_specs
    monkeypatch.setattr(prefetching, "_read_specs", lambda paths: time.sleep(0.5) or slow(paths))
    reading = fastload.prefetch(file)
    pid = os.fork()
    if pid == 0:  # the child: no assertion may get out of here
        os._exit(0 if reading.wait() and reading.is_done and not prefetching._running else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert reading.wait(20)


def test_an_automatic_load_reads_ahead_before_it_imports_torch(tmp_path: Path) -> None:
    config = fastload.BertConfig(vocab_size=5000, hidden_size=512, num_hidden_layers=2, num_attention_heads=8)
    fastload.BertModel(config).save_pretrained(tmp_path)
    make_cold(tmp_path / "model.safetensors")
    script = """
import json, sys, fastload
from fastload import prefetching
from fastload.models import registry
seen, original = {}, registry.class_for
def class_for(*args, **options):
    seen["running"], seen["torch"] = len(prefetching._running), "torch" in sys.modules
    return original(*args, **options)
registry.class_for = class_for
model = fastload.AutoModel.from_pretrained(sys.argv[1])
print(json.dumps(seen | {"class": type(model).__name__}))
"""
    assert in_fresh_process(script, tmp_path) == {"running": 1, "torch": False, "class": "BertModel"}


def test_a_thousand_loads_leave_threads_and_descriptors_flat(folder: Path) -> None:
    module = nn.Linear(4, 4)
    small = folder / "small.safetensors"
    save_file(module.state_dict(), small)
    fastload.load_model(module, small)
    n_open = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        fastload.load_model(module, small)
    for _ in range(5):
        make_cold(folder / "model.safetensors")
        fastload.load_model(stack(), folder / "model.safetensors")
        wait_for_no_threads()
    assert threads() == []
    assert len(os.listdir("/proc/self/fd")) == n_open


@pytest.mark.usefixtures("over_network", "stays_cold")
def test_a_cold_file_on_a_network_is_read_in_parallel_into_own_memory(file: Path, folder: Path) -> None:
    module = stack()
    report = fastload.load_model(module, folder)
    with open("/proc/self/maps") as maps:
        assert str(file) not in maps.read()
    assert report.bytes_by_action == {"copy": sum(t.nbytes for t in module.state_dict().values())}
    assert any(note.endswith(" in reads of 4 MB") for note in report.notes)
    expected = load_file(file)
    assert all(same_bytes(tensor, expected[key]) for key, tensor in module.state_dict().items())
    wait_for_no_threads()


@pytest.mark.usefixtures("over_network")
def test_a_warm_file_on_a_network_is_mapped(folder: Path) -> None:
    resident(folder / "model.safetensors")
    assert set(fastload.load_model(stack(), folder).bytes_by_action) == {"map"}


@pytest.mark.usefixtures("over_network", "stays_cold")
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float64"}])
def test_a_cold_file_on_a_network_is_converted(file: Path, folder: Path, options: dict[str, str]) -> None:
    expected = load_file(file)
    make_cold(file)
    tensors = fastload.load_state_dict(folder, **options)
    dtype = getattr(torch, options["dtype"])
    assert all(same_bytes(tensor, expected[key].to(dtype)) for key, tensor in tensors.items())


def test_reading_gives_the_same_bytes_as_mapping(write_safetensors, tensors: dict[str, torch.Tensor]) -> None:  # type: ignore[no-untyped-def]
    checkpoint = fastload.open_checkpoint(write_safetensors(tensors))
    (path,) = checkpoint.files
    file = ReadFile(path, checkpoint.n_file_bytes(path))
    for key, spec in checkpoint.specs.items():
        assert same_bytes(file.tensor(spec), tensors[key])
        file.release(spec.region)
    for tensor, key in zip(file.tensors(list(checkpoint.specs.values())), checkpoint.specs, strict=True):
        assert same_bytes(tensor, tensors[key])


def test_a_file_that_is_read_and_was_cut_is_an_error(folder: Path) -> None:
    path = str(folder / "model.safetensors")
    checkpoint = fastload.open_checkpoint(path)
    n_bytes = checkpoint.n_file_bytes(path)
    file = ReadFile(path, n_bytes)
    os.truncate(path, n_bytes // 2)
    with pytest.raises(TruncatedFileError):
        file.fill(checkpoint.specs.values())
    with pytest.raises(TruncatedFileError):
        ReadFile(path, n_bytes)
