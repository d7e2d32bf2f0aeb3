"""What is measured of a loader, in its own process: loads, first forwards, and fifty loads one after the other."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from suite.checkpoints import n_weight_bytes, weight_files
from suite.cold import cached_share
from suite.fingerprint import ResultsDifferError
from suite.memory import PrivatePeak, private_bytes

from gpu_suite.device import Device, free_pinned_memory
from gpu_suite.fingerprint import fingerprint
from gpu_suite.hardware import drop
from gpu_suite.loaders import Loader

if TYPE_CHECKING:
    import torch

__all__ = ["first_forwards", "loads", "repeated_loads"]

_N_TOKENS = 128
_N_FORWARDS = 3
_N_SETTLING = 5
_SAMPLING_S = 0.01
# Of the largest output; bf16 keeps 8 bits of a number.
_OUTPUT_TOLERANCE = 0.01


def loads(
    loader: Loader, device: Device, folder: Path, *, dtype: torch.dtype | None, times: int, cold: bool
) -> dict[str, Any]:
    """Load so many times, what came before being let go; then take the fingerprint of the last.

    Returns:
        ``first_s``, and ``seconds``: of the later loads, or of the one. ``n_bytes`` of the files; their
        ``cached_share`` before the last load. The most by which host memory (anonymous; ``host_peak_bytes``) and the
        device's (``device_peak_bytes``, of torch's allocator) grew in the course of the last load, and what the device
        has more of afterwards (``device_bytes``).
    """
    files, seconds = weight_files(folder), []
    for _ in range(times):
        result = None
        device.clear()
        if cold:
            drop(files)
        share = min(cached_share(file) for file in files)
        used_bytes, reserved_bytes, anonymous_bytes = device.used_bytes(), device.held_bytes(), private_bytes()
        with PrivatePeak(_SAMPLING_S) as host:
            begun = perf_counter()
            result = loader.load(folder, device.name, dtype)
            device.synchronise()
            seconds.append(perf_counter() - begun)
        device_bytes = device.used_bytes() - used_bytes
    return {
        "first_s": seconds[0],
        "seconds": seconds[1:] or seconds,
        "n_bytes": n_weight_bytes(folder),
        "cached_share": share,
        "host_peak_bytes": max(0, host.peak_bytes - anonymous_bytes),
        "device_peak_bytes": device.peak_bytes() - reserved_bytes,
        "device_bytes": device_bytes,
        "digest": fingerprint(result),
    }


def first_forwards(
    loader: Loader, device: Device, folder: Path, *, times: int, cold: bool, stream: bool
) -> dict[str, Any]:
    """From the call of the loader to the output of 128 tokens, when kernels are there and torch is warm.

    Returns:
        ``load_s`` and ``forward_s``, each for itself; ``seconds`` of both, one after the other. With ``stream``,
        ``stream_s``: of a forward that begins while weights arrive, and ``return_s``, when it could begin.

    Raises:
        ResultsDifferError: the outputs differ.
    """
    files, found = weight_files(folder), dict[str, list[float]](load_s=[], forward_s=[], seconds=[])
    if stream:
        found |= {"stream_s": [], "return_s": []}
    model = loader.load(folder, device.name, None)
    expected, _ = _forward(model, device)
    found["forward_s"] = [_forward(model, device)[1] for _ in range(_N_FORWARDS)]
    for is_streamed in [False, *[True] * stream] * times:
        model = None
        device.clear()
        if cold:
            drop(files)
        begun = perf_counter()
        model = loader.load(folder, device.name, None, **({"stream": True} if is_streamed else {}))
        if not is_streamed:
            device.synchronise()
        load_s = perf_counter() - begun
        output, forward_s = _forward(model, device)
        found["stream_s" if is_streamed else "seconds"].append(load_s + forward_s)
        found["return_s" if is_streamed else "load_s"].append(load_s)
        _check_output(output, expected, "streamed" if is_streamed else "loaded")
    if stream:
        import fastload

        fastload.wait(model)
    return {**found, "n_bytes": n_weight_bytes(folder), "digest": fingerprint(model)}


def repeated_loads(loader: Loader, device: Device, folder: Path, *, times: int) -> dict[str, Any]:
    """Load and let go, many times: what has grown between the fifth load and the last.

    Returns:
        ``host_growth_bytes`` (anonymous memory and memory shared with the driver, as pinned memory is),
        ``device_growth_bytes``, ``thread_growth``, ``file_growth`` (open files), the ``seconds`` of the loads, and
        ``freed_bytes``: what host memory lost when pinned memory was given back.
    """
    seconds: list[float] = []
    before = _holdings(device)
    for n in range(times):
        begun = perf_counter()
        model = loader.load(folder, device.name, None)
        device.synchronise()
        seconds.append(perf_counter() - begun)
        del model
        if n == min(_N_SETTLING, times) - 1:
            before = _holdings(device)
    after = _holdings(device)
    free_pinned_memory(device)
    growth = {f"{name}_growth{unit}": after[name, unit] - before[name, unit] for name, unit in after}
    freed_bytes = after["host", "_bytes"] - _holdings(device)["host", "_bytes"]
    return {**growth, "freed_bytes": freed_bytes, "times": times, "seconds": seconds, "checkpoint": folder.name}


def _forward(model: Any, device: Device) -> tuple[torch.Tensor, float]:
    """The logits, and the seconds until they are there."""
    import torch

    tokens = (torch.arange(_N_TOKENS) * 3 + 1).unsqueeze(0)
    begun = perf_counter()
    with torch.inference_mode():
        logits = model(tokens.to(device.name)).logits
    device.synchronise()
    seconds = perf_counter() - begun
    return logits.float(), seconds


def _check_output(output: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    gap, size = float((output - expected).abs().max()), float(expected.abs().max())
    if not gap <= size * _OUTPUT_TOLERANCE:
        raise ResultsDifferError(f"the output of the {what} model differs by {gap} from that of the first, {size}")


def _holdings(device: Device) -> dict[tuple[str, str], int]:
    device.clear()
    with open("/proc/self/status") as status:
        sizes = dict(line.split(":", 1) for line in status)
    return {
        ("host", "_bytes"): sum(int(sizes[field].split()[0]) * 1024 for field in ("RssAnon", "RssShmem")),
        ("device", "_bytes"): device.used_bytes(),
        ("thread", ""): threading.active_count(),
        ("file", ""): len(os.listdir("/proc/self/fd")),
    }
