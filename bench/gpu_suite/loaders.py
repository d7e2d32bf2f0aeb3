"""The ways to have a checkpoint's weights on a device, each as its documentation recommends it.

Models come from fastload and transformers. The other libraries know tensors, and give a dict of them; where experts are
fused in the model, their tensors are stacked by hand, on the device. No module is built of the dict: a load by them is
charged with less than a user pays.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.checkpoints import weight_files

from gpu_suite.device import Device
from gpu_suite.schedule import NotHereError

if TYPE_CHECKING:
    import torch

__all__ = ["LOADERS", "Loader"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """One way to load.

    Attributes:
        package: what must be installed.
        prepare: (device) -> None. Imports all that a load needs. NotHereError where it cannot load to it.
        load: (folder, device, dtype, options) -> a model in eval mode, or a dict of tensors.
        priority: of its turns.
        gb_per_s: a guess, for the time that a load takes.
        gives_model: whether what it gives can be run.
        streams: whether that may begin while weights arrive.
    """

    package: str
    prepare: Callable[[Device], None]
    load: Callable[..., Any]
    priority: int
    gb_per_s: float
    gives_model: bool = False
    streams: bool = False


def _prepare_fastload(_: Device) -> None:
    from fastload import AutoModelForCausalLM, LlamaForCausalLM, Qwen3MoeForCausalLM  # noqa: F401


def _fastload(folder: Path, device: str, dtype: torch.dtype | None, **options: Any) -> Any:
    from fastload import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map=device, dtype=dtype or "auto", **options)


def _fastload_state(folder: Path, device: str, dtype: torch.dtype | None) -> Any:
    import fastload

    return _fused(fastload.load_state_dict(folder, device=device, dtype=dtype))


def _prepare_hf(device: Device) -> None:
    import fastload.hf  # noqa: F401

    _prepare_transformers(device)


def _fastload_hf(folder: Path, device: str, dtype: torch.dtype | None, **options: Any) -> Any:
    from fastload.hf import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map=device, dtype=dtype or "auto", **options)


def _prepare_transformers(_: Device) -> None:
    import accelerate  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3MoeForCausalLM  # noqa: F401


def _transformers(folder: Path, device: str, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map=device, dtype=dtype or "auto")


def _prepare_safetensors(_: Device) -> None:
    import safetensors.torch  # noqa: F401


def _safetensors(folder: Path, device: str, dtype: torch.dtype | None) -> Any:
    from safetensors.torch import load_file

    return _converted({k: v for file in weight_files(folder) for k, v in load_file(file, device=device).items()}, dtype)


def _prepare_prefetch(device: Device) -> None:
    from safetensors import __version__, safe_open

    if not hasattr(safe_open, "prefetch"):
        raise NotHereError(f"safetensors {__version__} has no prefetch (--newer-safetensors names a folder with 0.9)")
    if not device.is_gpu:
        raise NotHereError("prefetch of safetensors loads to CUDA devices only")


def _prefetch(folder: Path, device: str, dtype: torch.dtype | None) -> Any:
    from safetensors import safe_open

    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(file, framework="pt", device=device)) for file in weight_files(folder)]
        begun = [file.prefetch() for file in files]
        return _converted({key: tensor for loader in begun for key, tensor in loader}, dtype)


def _prepare_fastsafetensors(_: Device) -> None:
    import fastsafetensors  # noqa: F401


def _fastsafetensors(folder: Path, device: str, dtype: torch.dtype | None) -> Any:
    from fastsafetensors import fastsafe_open

    files = [str(file) for file in weight_files(folder)]
    with fastsafe_open(files, device=device, nogds=True) as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no mapping
    return _converted(state, dtype)


def _prepare_runai(_: Device) -> None:
    import runai_model_streamer  # noqa: F401


def _runai(folder: Path, device: str, dtype: torch.dtype | None) -> Any:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in weight_files(folder)], device=device)
        return _converted(dict(streamer.get_tensors()), dtype)


def _converted(state: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    if dtype is not None:
        state = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    return _fused(state)


def _fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as models have them: stacked, gate and up side by side. Pieces are let go layer by layer."""
    import torch

    experts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for key in [key for key in state if ".mlp.experts." in key]:
        prefix, _, rest = key.partition(".mlp.experts.")
        number, name, _ = rest.split(".")
        experts.setdefault(prefix, {}).setdefault(name, {})[int(number)] = state.pop(key)
    for prefix in list(experts):
        layer = experts.pop(prefix)
        gate, up, down = (
            torch.stack([pieces[number] for number in sorted(pieces)])
            for pieces in (layer.pop(name) for name in ("gate_proj", "up_proj", "down_proj"))
        )
        state[f"{prefix}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{prefix}.mlp.experts.down_proj"] = down
    return state


LOADERS: dict[str, Loader] = {
    "fastload": Loader(
        package="fastload",
        prepare=_prepare_fastload,
        load=_fastload,
        priority=0,
        gb_per_s=8,
        gives_model=True,
        streams=True,
    ),
    "transformers": Loader(
        package="transformers",
        prepare=_prepare_transformers,
        load=_transformers,
        priority=0,
        gb_per_s=3,
        gives_model=True,
    ),
    "safetensors": Loader(
        package="safetensors", prepare=_prepare_safetensors, load=_safetensors, priority=1, gb_per_s=3
    ),
    "fastload.hf": Loader(
        package="transformers",
        prepare=_prepare_hf,
        load=_fastload_hf,
        priority=2,
        gb_per_s=8,
        gives_model=True,
        streams=True,
    ),
    "fastload, a dict": Loader(
        package="fastload", prepare=_prepare_fastload, load=_fastload_state, priority=3, gb_per_s=8
    ),
    "safetensors prefetch": Loader(
        package="safetensors", prepare=_prepare_prefetch, load=_prefetch, priority=2, gb_per_s=8
    ),
    "fastsafetensors": Loader(
        package="fastsafetensors", prepare=_prepare_fastsafetensors, load=_fastsafetensors, priority=3, gb_per_s=4
    ),
    "runai streamer": Loader(
        package="runai-model-streamer", prepare=_prepare_runai, load=_runai, priority=3, gb_per_s=4
    ),
}
