"""The same on CUDA: what arrives, what memory it takes, what is left when something goes wrong."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastload
from fastload.checkpoint import open_checkpoint
from fastload.errors import DeviceMemoryError, OptionError, TruncatedFileError
from fastload.placement.device import Staging, stage
from fastload.plan.fusing import Concatenate, Fusion, Stack
from fastload.plan.planning import plan_state_dict
from fastload.storage.devices import CopyStream, CudaDevice, device_for
from fastload.storage.memory import private_bytes
from fastload.storage.residency import file_system
from fastload.storage.ring import kept_pinned_bytes
from tests.cold import make_cold, wait_for_no_threads
from tests.conftest import same_bytes

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    wait_for_no_threads()
    fastload.free_pinned_memory()
    assert kept_pinned_bytes() == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some 100 MB: large and small tensors of several types."""
    generator = torch.Generator().manual_seed(4)
    made = {f"layers.{i}.weight": torch.randn(1024, 1024, generator=generator).bfloat16() for i in range(40)}
    made |= {f"layers.{i}.norm": torch.randn(1024 + i, generator=generator) for i in range(40)}
    made |= {"table": torch.randn(3000, 1024, generator=generator), "scalar": torch.tensor(2.5)}
    made |= {"empty": torch.empty(0, 3), "ids": torch.arange(100), "f8": torch.randn(64).to(torch.float8_e4m3fn)}
    save_file(made, tmp_path / "model.safetensors")
    return tmp_path


def group_of(name: str) -> int:
    return int(name.split(".")[1]) + 1 if name.startswith("layers.") else 0


def rows_of(folder: Path, dtype: Any = None) -> Any:
    return plan_state_dict(open_checkpoint(folder).specs, dtype=dtype, device="cuda:0").rows


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32", "float16"])
@pytest.mark.parametrize("is_cold", [False, True])
def test_a_state_dict_is_the_one_of_the_cpu(folder: Path, dtype: Any, is_cold: bool) -> None:
    expected = fastload.load_state_dict(folder, dtype=dtype)
    if is_cold:
        expected = {key: tensor.clone() for key, tensor in expected.items()}
        make_cold(folder / "model.safetensors")
    found = fastload.load_state_dict(folder, device="cuda", dtype=dtype)
    assert found.keys() == expected.keys()
    assert all(tensor.device == torch.device("cuda", torch.cuda.current_device()) for tensor in found.values())
    assert [key for key in expected if not same_bytes(found[key], expected[key])] == []


def test_tensors_of_a_bin_file_whatever_their_storage(tmp_path: Path) -> None:
    base = torch.randn(64, 64)
    torch.save({"whole": base, "tied": base, "turned": base.t(), "row": base[3]}, tmp_path / "pytorch_model.bin")
    expected = fastload.load_state_dict(tmp_path)
    found = fastload.load_state_dict(tmp_path, device="cuda:0")
    assert all(same_bytes(found[key], expected[key]) for key in expected)


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.empty(6, 2 * 24, 40))
        self.across = torch.nn.Parameter(torch.empty(6, 40, 2 * 24))


FUSIONS = [
    Fusion(("e.*.a", "e.*.b"), "up", (Stack(0), Concatenate(1))),
    Fusion(("e.*.c", "e.*.d"), "across", (Stack(0), Concatenate(2))),
]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("is_on_meta", [True, False])
def test_fused_tensors(tmp_path: Path, dtype: str | None, is_on_meta: bool) -> None:
    tensors = {f"e.{i}.{name}": torch.randn(24, 40) for i in range(6) for name in "ab"}
    tensors |= {f"e.{i}.{name}": torch.randn(40, 24) for i in range(6) for name in "cd"}
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        found, expected = Experts(), Experts()
    if not is_on_meta:
        found = found.to_empty(device="cuda").to(getattr(torch, dtype or "float32"))
    held = dict(found.named_parameters())
    report = fastload.load_model(found, tmp_path, device="cuda", dtype=dtype, fusions=FUSIONS)
    fastload.load_model(expected, tmp_path, dtype=dtype, fusions=FUSIONS)
    assert all(same_bytes(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    assert all(parameter.is_cuda for parameter in found.parameters())
    assert is_on_meta or all(held[name] is parameter for name, parameter in found.named_parameters())
    assert any("to cuda:" in note for note in report.notes)


def small_llama(folder: Path) -> fastload.LlamaForCausalLM:
    torch.manual_seed(5)
    config = fastload.LlamaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    model: Any = fastload.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("last", ["cpu", "cuda:1", "disk"])
def test_a_model_on_a_device_and_elsewhere(tmp_path: Path, last: str) -> None:
    if last == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    small_llama(tmp_path)
    expected: Any = fastload.LlamaForCausalLM.from_pretrained(tmp_path)
    device_map = {"": "cuda:0", "model.layers.2": last, "model.layers.3": last}
    found: Any = fastload.LlamaForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    ids = torch.arange(12).reshape(2, 6)
    logits = found(ids.to("cuda:0")).logits
    torch.testing.assert_close(logits.cpu(), expected(ids).logits, rtol=1e-3, atol=1e-3)
    # What is copied to a device for each forward stands on no mapping of a file.
    assert fastload.report(found).bytes_by_action.keys() <= {"move", "copy"}


def test_the_first_groups_can_be_used_while_others_are_under_way(folder: Path) -> None:
    expected = fastload.load_state_dict(folder)
    device = device_for("cuda:0")
    assert device is not None
    staged = stage(rows_of(folder), device, Staging(device_for), group_of=group_of)
    with staged.transfer as transfer:
        for group in range(41):
            transfer.hold_back(group)
            names = [name for name in staged.tensors if group_of(name) == group]
            # A kernel on the caller's stream, which has to come after the copies.
            copies = {name: staged.tensors[name].clone() for name in names}
            assert all(same_bytes(copies[name], expected[name]) for name in names)
        transfer.wait()


def test_fifty_loads_leave_no_memory_behind(folder: Path) -> None:
    for _ in range(3):
        fastload.load_state_dict(folder, device="cuda:0")
    torch.cuda.synchronize()
    reserved, pinned, private = torch.cuda.memory_reserved(0), kept_pinned_bytes(), private_bytes()
    for _ in range(50):
        fastload.load_state_dict(folder, device="cuda:0")
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved(0) == reserved
    assert kept_pinned_bytes() == pinned
    assert private is not None
    assert (private_bytes() or 0) - private < 32 << 20


def test_device_memory_beyond_the_weights_is_bounded(folder: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    found = fastload.load_state_dict(folder, device="cuda:0", dtype="float32")
    n_bytes = sum(tensor.nbytes for tensor in found.values())
    assert torch.cuda.max_memory_allocated(0) - before <= n_bytes + (256 << 20)


def test_the_ring_is_pinned_bounded_kept_and_given_back(folder: Path) -> None:
    fastload.load_state_dict(folder, device="cuda:0", pinned_memory=48 << 20)
    assert 0 < kept_pinned_bytes() <= 48 << 20
    assert fastload.free_pinned_memory() > 0
    device = CudaDevice(0)
    memory = device.pin(1 << 20)
    assert memory.tensor.is_pinned()
    memory.release()


def test_pages_of_a_memory_file_system_are_registered_kept_and_given_back(folder: Path) -> None:
    if not file_system("/dev/shm").is_memory:
        pytest.skip("no memory file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as where:
        shutil.copy(folder / "model.safetensors", where)
        expected = fastload.load_state_dict(where)
        for pinned_memory in ("128MB", "1GB", "1GB"):  # by trial, registered and kept, from what was kept
            found = fastload.load_state_dict(where, device="cuda:0", pinned_memory=pinned_memory)
            assert [key for key in expected if not same_bytes(found[key].cpu(), expected[key])] == []
        assert fastload.free_pinned_memory() > 0
        # Nothing is left of a refusal that the next kernel would be told.
        assert float(found["scalar"] + 1) == 3.5


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="does not have that CUDA device"):
        fastload.load_state_dict(folder, device=f"cuda:{torch.cuda.device_count()}")


def test_too_little_device_memory_is_told_and_all_is_freed(folder: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(0)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + (32 << 20)) / total, 0)
    try:
        with pytest.raises(DeviceMemoryError, match="cuda:0"):
            fastload.load_state_dict(folder, device="cuda:0")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert torch.cuda.memory_allocated(0) == before
    assert fastload.load_state_dict(folder, device="cuda:0")["scalar"].item() == 2.5


def test_a_file_that_is_cut_ends_the_load(folder: Path) -> None:
    rows = rows_of(folder)
    os.truncate(folder / "model.safetensors", 10 << 20)
    device = device_for("cuda:0")
    assert device is not None
    with pytest.raises(TruncatedFileError, match=r"model\.safetensors"):
        stage(rows, device, Staging(device_for)).transfer.wait()


class _Interrupted(CudaDevice):
    """Sends ctrl-C to the process with the second copy of a stream."""

    def open_stream(self) -> CopyStream:
        return _InterruptedStream(super().open_stream())


class _InterruptedStream:
    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._n_copies = 0
        self.chosen, self.record, self.close = stream.chosen, stream.record, stream.close

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._n_copies += 1
        if self._n_copies == 2:
            os.kill(os.getpid(), signal.SIGINT)
        self._stream.copy(destination, source)


def load_until_interrupted(folder: Path) -> None:
    with stage(rows_of(folder), _Interrupted(0), Staging(device_for)).transfer as transfer:
        while True:  # however short the transfer is, the signal comes while it is waited for
            transfer.wait()


def test_ctrl_c_leaves_a_process_that_can_load(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_until_interrupted(folder)
    wait_for_no_threads()
    expected = fastload.load_state_dict(folder)
    found = fastload.load_state_dict(folder, device="cuda:0")
    assert all(same_bytes(found[key], expected[key]) for key in expected)


def test_tensors_that_arrive_in_inference_mode_can_be_trained(folder: Path) -> None:
    with torch.inference_mode():
        found = fastload.load_state_dict(folder, device="cuda:0")
    weight = found["table"].requires_grad_()
    weight.sum().backward()
    assert weight.grad is not None


def test_transformers_models_on_a_device(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import fastload.hf as hf

    config = transformers.LlamaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda:0")
    assert any("to cuda:" in note for note in fastload.report(found).notes)
    assert all(same_bytes(value, expected[name]) for name, value in found.state_dict().items())
