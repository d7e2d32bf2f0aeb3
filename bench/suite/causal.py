"""The ways to get a causal language model of transformers out of a folder, each as its documentation recommends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite import streamers
from suite.checkpoints import weight_files
from suite.loaders import Loader

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICE_MAP_LOADERS", "LATER_LOADERS", "LLAMA_LOADERS", "MOE_LOADERS"]

_N_ENTRIES = 404
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}


def _classes(folder: Path) -> tuple[Any, Any]:
    """The checkpoint's config, and the class of its model."""
    import transformers

    model_class = getattr(transformers, _ARCHITECTURES[folder.name.partition("-")[0]])
    return model_class.config_class.from_pretrained(folder), model_class


def _skeleton(folder: Path) -> Any:
    """transformers' module on meta, its rotary buffers real, no initialiser run."""
    import torch
    from transformers.initialization import no_init_weights

    config, model_class = _classes(folder)
    with no_init_weights(), torch.device("meta"):
        model = model_class(config).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _fastload(folder: Path, dtype: torch.dtype | None = None, **options: Any) -> Any:
    from fastload import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **options)


def _fastload_read(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A load that ends when all bytes have been read, as loaders do that do not map."""
    import fastload

    model = _fastload(folder, dtype)
    fastload.prefetch(folder).wait()
    return model


def _wait(model: Any) -> None:
    from fastload import wait

    wait(model)


def _fastload_hf(folder: Path, dtype: torch.dtype | None = None, **options: Any) -> Any:
    from fastload.hf import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **options)


def _transformers(folder: Path, dtype: torch.dtype | None = None, **options: Any) -> Any:
    _, model_class = _classes(folder)
    return model_class.from_pretrained(folder, dtype=dtype or "auto", **options)


def _with_device_map(load: Callable[..., Any]) -> Callable[[Path], Any]:
    """A load with an entry for every parameter and for many modules: 404 in all, as large models' maps have."""

    return lambda folder: load(folder, device_map=_device_map(folder))


@cache
def _device_map(folder: Path) -> dict[str, str]:
    skeleton = _skeleton(folder)
    modules = [name for name, _ in skeleton.named_modules() if name]
    names = [name for name, _ in skeleton.named_parameters()] + modules
    return dict.fromkeys(names[:_N_ENTRIES], "cpu")


def _accelerate(folder: Path, dtype: torch.dtype | None = None) -> Any:
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    config, model_class = _classes(folder)
    with init_empty_weights():
        model = model_class(config).eval()
    return load_checkpoint_and_dispatch(model, str(folder), device_map={"": "cpu"}, dtype=dtype or torch.bfloat16)


def _safetensors(folder: Path, dtype: torch.dtype | None = None) -> Any:
    return _assigned(folder, _load_files(folder), dtype)


def _torch_load(folder: Path, dtype: torch.dtype | None = None) -> Any:
    import torch

    state = torch.load(folder / "pytorch_model.bin", mmap=True, weights_only=True)
    return _assigned(folder, state, dtype)


def _fastsafetensors(folder: Path, dtype: torch.dtype | None = None) -> Any:
    return _assigned(folder, streamers.fastsafetensors_state(weight_files(folder)), dtype)


def _runai(folder: Path, dtype: torch.dtype | None = None) -> Any:
    return _assigned(folder, streamers.runai_state(weight_files(folder)), dtype)


def _tensorizer(folder: Path) -> Any:
    model = _skeleton(folder)
    streamers.tensorizer_fill(model, folder / "model.tensors")
    return model


def _safetensors_moe(folder: Path, dtype: torch.dtype | None = None) -> Any:
    return _assigned(folder, _with_fused_experts(_load_files(folder)), dtype)


def _load_files(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: tensor for path in weight_files(folder) for key, tensor in load_file(path).items()}


def _assigned(folder: Path, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Any:
    """The module by hand: built on meta, given the tensors by ``load_state_dict(assign=True)``."""
    model = _skeleton(folder)
    model.load_state_dict(state, assign=True)
    return model.to(dtype) if dtype else model


def _with_fused_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of each layer as transformers' modules have them: stacked, gate and up side by side."""
    import torch

    fused = {key: tensor for key, tensor in state.items() if ".mlp.experts." not in key}
    prefixes = dict.fromkeys(key.partition(".experts.")[0] for key in state if ".mlp.experts." in key)
    for prefix in prefixes:
        experts = range(sum(key.startswith(f"{prefix}.experts.") and "gate_proj" in key for key in state))

        def stacked(name: str, prefix: str = prefix, experts: range = experts) -> torch.Tensor:
            return torch.stack([state.pop(f"{prefix}.experts.{expert}.{name}.weight") for expert in experts])

        fused[f"{prefix}.experts.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=1)
        fused[f"{prefix}.experts.down_proj"] = stacked("down_proj")
    return fused


LLAMA_LOADERS = {
    "fastload": Loader("safetensors", _fastload),
    "fastload.hf": Loader("safetensors", _fastload_hf),
    "transformers": Loader("safetensors", _transformers),
    "accelerate": Loader("safetensors", _accelerate),
    "safetensors": Loader("safetensors", _safetensors),
    "fastsafetensors": Loader("safetensors", _fastsafetensors, needs="fastsafetensors"),
    "runai streamer": Loader("safetensors", _runai, needs="runai_model_streamer"),
    "tensorizer": Loader("tensors", _tensorizer, needs="tensorizer"),
    "fastload .bin": Loader("bin", _fastload),
    "torch.load(mmap)": Loader("bin", _torch_load),
}
MOE_LOADERS = {
    "fastload": Loader("safetensors", _fastload),
    "fastload.hf": Loader("safetensors", _fastload_hf),
    "transformers": Loader("safetensors", _transformers),
    "safetensors": Loader("safetensors", _safetensors_moe),
}
LATER_LOADERS = {
    "stream": Loader("safetensors", partial(_fastload, stream=True), complete=_wait),
    "lazy": Loader("safetensors", partial(_fastload, lazy=True), complete=_wait),
    "mapped": Loader("safetensors", _fastload),
    "read": Loader("safetensors", _fastload_read),
    "transformers": Loader("safetensors", _transformers),
}
DEVICE_MAP_LOADERS = {
    "fastload": Loader("safetensors", _with_device_map(_fastload_hf)),
    "transformers": Loader("safetensors", _with_device_map(_transformers)),
}
