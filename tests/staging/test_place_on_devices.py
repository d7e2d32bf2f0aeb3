"""Every way to a device gives what the plain way gives on the CPU, byte for byte."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import fastload
from fastload.checkpoint import Checkpoint, open_checkpoint
from fastload.detaching import detach
from fastload.dtypes import DTYPES
from fastload.errors import DeviceMemoryError, OptionError, TruncatedFileError
from fastload.filling import fill_module
from fastload.options import LoadOptions, parse_dtype
from fastload.placement.device import Staging, begin_pinning, place_on_devices
from fastload.placement.placing import place_all
from fastload.plan.boxes import Box, narrow
from fastload.plan.fusing import Concatenate, Fusion, Stack
from fastload.plan.keys import KeyMatch, KeyRules
from fastload.plan.planning import plan_state_dict
from fastload.plan.rows import Action, LoadPlan, PlanRow
from fastload.plan.staging import Limits
from fastload.reports import LoadReport, Stopwatch
from fastload.storage.cpu_device import CpuDevice
from fastload.storage.devices import Device
from tests.cold import threads, wait_for_no_threads
from tests.conftest import same_bytes
from tests.staging.conftest import LIMITS, mixed_tensors
from tests.staging.devices import CountingDevice, GatedDevice

StagingTo = Callable[..., Staging]


def state_dict_on(checkpoint: Checkpoint, staging: Staging, dtype: str | None = None) -> dict[str, torch.Tensor]:
    plan = plan_state_dict(checkpoint.specs, dtype=parse_dtype(dtype), device="cuda:0")
    return place_all(plan, checkpoint.open_file, staging).tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [key for key in expected if not same_bytes(found[key], expected[key])]
    assert different == []


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_state_dict_is_the_one_of_the_cpu(tmp_path: Path, staging_to: StagingTo, ending: str, dtype: Any) -> None:
    if ending == ".bin":
        torch.save(mixed_tensors(), tmp_path / "pytorch_model.bin")
    else:
        save_file(mixed_tensors(), tmp_path / "model.safetensors")
    device = CountingDevice()
    found = state_dict_on(open_checkpoint(tmp_path), staging_to(device), dtype)
    assert device.allocated
    assert_same(found, fastload.load_state_dict(tmp_path, dtype=dtype))


def test_tensors_of_several_files(tmp_path: Path, staging_to: StagingTo) -> None:
    fastload.save_state_dict(mixed_tensors(), tmp_path, max_shard_size=400_000)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 3
    assert_same(state_dict_on(checkpoint, staging_to(CountingDevice())), fastload.load_state_dict(tmp_path))


def test_tied_tensors_arrive_once_and_what_is_no_run_of_bytes_is_left(tmp_path: Path, staging_to: StagingTo) -> None:
    base = torch.randn(64, 64)
    tensors = {"whole": base, "tied": base, "turned": base.t(), "column": base[:, 3], "other": torch.randn(5)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint, device = open_checkpoint(tmp_path), CountingDevice()
    plan = plan_state_dict(checkpoint.specs, dtype=None, device="cuda:0")
    left, found, notes = place_on_devices(plan, staging_to(device), {})
    assert {row.fqn for row in left.rows} == {"turned", "column"}
    assert notes[-1].startswith("2 tensors (16.6 kB) are made in memory first")
    assert found["whole"].data_ptr() == found["tied"].data_ptr()
    assert_same(found, {key: tensors[key] for key in ("whole", "tied", "other")})


def test_compressed_and_big_endian_tensors_are_left(tmp_path: Path, staging_to: StagingTo) -> None:
    torch.save({"a": torch.randn(8)}, tmp_path / "pytorch_model.bin")
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    plan = plan_state_dict(open_checkpoint(tmp_path).specs, dtype=None, device="cuda:0")
    left, found, notes = place_on_devices(plan, staging_to(CountingDevice()), {})
    assert (left, found) == (plan, {})
    assert notes[0].startswith("1 tensors (32 B) are made in memory first")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_views_of_a_storage_are_staged_by_their_own_bytes(
    tmp_path: Path, staging_to: StagingTo, dtype: str | None
) -> None:
    base = torch.randn(300, 300)  # more than a chunk
    views = {"row": base[7], "rows": base[100:250], "all but one": base.reshape(-1)[1:], "one": base[3:4, :40]}
    torch.save({"whole": base} | views, tmp_path / "pytorch_model.bin")
    checkpoint, device = open_checkpoint(tmp_path), CountingDevice()
    plan = plan_state_dict(checkpoint.specs, dtype=parse_dtype(dtype), device="cuda:0")
    left, found, _ = place_on_devices(plan, staging_to(device), {})
    assert not left.rows
    assert_same(found, fastload.load_state_dict(tmp_path, dtype=dtype))
    assert found["row"].untyped_storage().nbytes() < base.nbytes // 2


def test_eight_bit_floats_and_complex_numbers(tmp_path: Path, staging_to: StagingTo) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    tensors = {"e4": bits.view(torch.float8_e4m3fn), "e5": bits.clone().view(torch.float8_e5m2)}
    save_file(tensors | {"complex": torch.randn(6, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    found = state_dict_on(open_checkpoint(tmp_path), staging_to(CountingDevice()), "bfloat16")
    assert_same(found, fastload.load_state_dict(tmp_path, dtype="bfloat16"))


def parts_of(checkpoint: Checkpoint, box: Box, device: str, dtype: str = "F32") -> LoadPlan:
    spec = narrow(checkpoint.specs["weight"], box)
    return LoadPlan((PlanRow("weight", spec, DTYPES[dtype], device, Action.SLICE),), KeyMatch({}, (), (), ()))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("box", [Box((0, 1, 16384), (3, 4, 16384)), Box((1, 2, 0), (2, 2, 40_000))])
def test_parts_whose_long_rows_lie_apart_are_staged(
    tmp_path: Path, staging_to: StagingTo, box: Box, dtype: str
) -> None:
    whole = torch.randn(3, 5, 40_000)
    save_file({"weight": whole}, tmp_path / "model.safetensors")
    checkpoint, device = open_checkpoint(tmp_path), CountingDevice()
    plan = parts_of(checkpoint, box, "cuda:0", dtype)
    left, found, _ = place_on_devices(plan, staging_to(device), {})
    assert left.rows == ()
    index = tuple(slice(begin, begin + size) for begin, size in zip(*box, strict=True))
    assert_same(found, {"weight": whole[index].to(found["weight"].dtype)})
    given = torch.zeros(box.shape)
    staging = staging_to(CountingDevice("cpu"))
    left, found, _ = place_on_devices(parts_of(checkpoint, box, ""), staging, {"weight": given})
    assert found["weight"] is given
    assert_same(found, {"weight": whole[index]})


def test_parts_in_short_rows_are_put_together_first(tmp_path: Path, staging_to: StagingTo) -> None:
    save_file({"weight": torch.randn(50, 200)}, tmp_path / "model.safetensors")
    plan = parts_of(open_checkpoint(tmp_path), Box((0, 0), (50, 100)), "cuda:0")
    assert place_on_devices(plan, staging_to(CountingDevice()), {}) == (plan, {}, ())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=12),
    n_slots=st.integers(2, 5),
    n_pages=st.integers(2, 6),
    kinds=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.int16]), min_size=1, max_size=3),
    dtype=st.sampled_from([None, "float16"]),
)
def test_any_checkpoint_arrives_as_it_is(
    tmp_path: Path, sizes: list[int], n_slots: int, n_pages: int, kinds: list[torch.dtype], dtype: str | None
) -> None:
    tensors = {f"t{i}": torch.arange(n).to(kinds[i % len(kinds)]) for i, n in enumerate(sizes)}
    save_file(tensors, tmp_path / "model.safetensors")
    limits = Limits(chunk_bytes=n_pages * 4096, alone_bytes=8192, buffer_bytes=16384)
    staging = Staging({"cuda:0": CpuDevice("cuda:0")}.get, n_slots * limits.chunk_bytes, limits)
    found = state_dict_on(open_checkpoint(tmp_path), staging, dtype)
    assert_same(found, fastload.load_state_dict(tmp_path, dtype=dtype))


class Experts(torch.nn.Module):
    """Two fused parameters, one of them joined along its last dimension, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.empty(6, 2 * 24, 40))
        self.across = torch.nn.Parameter(torch.empty(6, 40, 2 * 24))
        self.norm = torch.nn.LayerNorm(40)


FUSIONS = [
    Fusion(("e.*.a", "e.*.b"), "up", (Stack(0), Concatenate(1))),
    Fusion(("e.*.c", "e.*.d"), "across", (Stack(0), Concatenate(2))),
]


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(2)
    tensors = {f"e.{i}.{name}": torch.randn(24, 40, generator=generator) for i in range(6) for name in "ab"}
    tensors |= {f"e.{i}.{name}": torch.randn(40, 24, generator=generator) for i in range(6) for name in "cd"}
    tensors |= {"norm.weight": torch.randn(40, generator=generator), "norm.bias": torch.randn(40, generator=generator)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def fill(module: torch.nn.Module, path: Path, staging: Staging, **options: Any) -> LoadReport:
    """Fill a module as `load_model` does; only the devices are the test's."""
    how = LoadOptions(strict=True, pinned_bytes=64 << 20, **options)
    rules = KeyRules(fusions=tuple(FUSIONS)) if isinstance(module, Experts) else KeyRules()
    checkpoint = open_checkpoint(path)
    return fill_module(module, checkpoint, how, source="test", clock=Stopwatch(), rules=rules, devices=staging.devices)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_fused_tensors_are_written_into_their_slices(experts: Path, staging_to: StagingTo, dtype: str | None) -> None:
    with torch.device("meta"):
        found, expected = Experts(), Experts()
    report = fill(found, experts, staging_to(CountingDevice()), device_map={"": "cuda:0"}, dtype=parse_dtype(dtype))
    fastload.load_model(expected, experts, fusions=FUSIONS, dtype=dtype)
    assert report.bytes_by_action.keys() == {"move"}
    assert "to cuda:0" in report.notes[-1]
    assert_same(found.state_dict(), expected.state_dict())


def test_memory_that_the_module_has_is_filled_in_place(experts: Path, staging_to: StagingTo) -> None:
    module, expected = Experts(), Experts()
    held = dict(module.named_parameters())
    device = CountingDevice("cpu")
    report = fill(module, experts, staging_to(device))
    fastload.load_model(expected, experts, fusions=FUSIONS)
    assert "to cpu" in report.notes[-1]
    assert all(parameter is held[name] for name, parameter in module.named_parameters())
    assert_same(module.state_dict(), expected.state_dict())
    assert sum(device.allocated) < 100_000  # the scratch of what is joined across, and nothing else


def layers() -> torch.nn.Sequential:
    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))


@pytest.fixture
def layers_on_disk(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    save_file(
        {name: torch.randn(value.shape) for name, value in layers().state_dict().items()},
        tmp_path / "model.safetensors",
    )
    return tmp_path


def test_several_devices_and_a_remainder_that_stands_on_no_file(layers_on_disk: Path, staging_to: StagingTo) -> None:
    first, second = CountingDevice("cuda:0"), CountingDevice("cuda:1")
    module, expected = layers(), layers()
    device_map = {"0": "cuda:0", "1": "cuda:0", "2": "cuda:1", "3": "cuda:1", "4": "cpu", "5": "cpu"}
    report = fill(module, layers_on_disk, staging_to(first, second), device_map=device_map)
    fastload.load_model(expected, layers_on_disk)
    assert_same(module.state_dict(), expected.state_dict())
    assert sum(first.allocated) == sum(second.allocated) == 2 * (64 * 64 + 64) * 4
    assert report.bytes_by_action.keys() == {"move", "copy"}
    # A driver that copies from a private mapping breaks its copy-on-write.
    assert detach(module) == 0


def test_a_remainder_without_an_accelerator_is_mapped(layers_on_disk: Path, staging_to: StagingTo) -> None:
    module = layers()
    report = fill(module, layers_on_disk, staging_to())
    assert report.bytes_by_action.keys() == {"map"}


def test_a_device_with_too_little_memory_is_refused_before_anything_is_taken(
    checkpoint: Checkpoint, staging_to: StagingTo
) -> None:
    device = CountingDevice(capacity_bytes=1_000_000)
    with pytest.raises(DeviceMemoryError) as raised:
        state_dict_on(checkpoint, staging_to(device))
    assert device.allocated == []
    assert device.n_pins == 0
    message = str(raised.value)
    assert "cuda:0" in message
    assert "1.0 MB" in message  # what is free; what is needed is above it
    assert "load to cpu" in message


def test_a_second_device_without_room_ends_what_the_first_began(layers_on_disk: Path, staging_to: StagingTo) -> None:
    first, second = CountingDevice("cuda:0"), CountingDevice("cuda:1", capacity_bytes=10)
    with pytest.raises(DeviceMemoryError, match="cuda:1"):
        fill(layers(), layers_on_disk, staging_to(first, second), device_map={"": "cuda:0", "5": "cuda:1"})
    assert threads() == []


def test_a_failure_on_one_device_ends_the_others(tmp_path: Path, staging_to: StagingTo) -> None:
    fastload.save_state_dict(mixed_tensors(), tmp_path, max_shard_size=1_000_000)
    checkpoint = open_checkpoint(tmp_path)
    plan = plan_state_dict(checkpoint.specs, dtype=None, device="cuda:0")
    cut = checkpoint.files[-1]
    rows = [row._replace(device="cuda:1") if row.spec.region.file == cut else row for row in plan.rows]
    Path(cut).write_bytes(b"")
    with pytest.raises(TruncatedFileError, match=Path(cut).name):
        place_on_devices(
            replace(plan, rows=tuple(rows)), staging_to(CountingDevice("cuda:0"), CountingDevice("cuda:1")), {}
        )
    assert threads() == []


def test_memory_beyond_the_weights_is_the_scratch(tmp_path: Path, staging_to: StagingTo) -> None:
    save_file({"a": torch.randn(1000, 1000), "b": torch.randn(1000, 1000)}, tmp_path / "model.safetensors")
    device = CountingDevice()
    state_dict_on(open_checkpoint(tmp_path), staging_to(device), "bfloat16")
    assert 0 < sum(device.allocated) - 2 * 2_000_000 <= LIMITS.chunk_bytes


def test_too_little_pinned_memory_is_refused(checkpoint: Checkpoint) -> None:
    device: Device = CountingDevice()
    with pytest.raises(OptionError, match="too little pinned memory"):
        state_dict_on(checkpoint, Staging({"cuda:0": device}.get, LIMITS.chunk_bytes, LIMITS))


def test_pinning_begins_before_the_plan_and_is_not_done_twice(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    device = CountingDevice()
    staging = staging_to(device)
    begin_pinning(["cuda:0", "cpu"], lambda: checkpoint.n_bytes, staging)
    state_dict_on(checkpoint, staging)
    wait_for_no_threads()
    assert device.n_pins == 4


def test_rows_that_no_device_is_known_for_are_left(checkpoint: Checkpoint, staging_to: StagingTo) -> None:
    plan: LoadPlan = plan_state_dict(checkpoint.specs, dtype=None, device="meta")
    assert place_on_devices(plan, staging_to(GatedDevice()), {}) == (plan, {}, ())
