"""The ways to get a tensor-parallel Llama onto the ranks of a process group, each as its documentation recommends it.

All lay it out by transformers' plan for the family, as DTensors. A loader is called by every rank, and returns the
module with this rank's parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["RANK_LOADERS", "local_parts"]


def local_parts(model: Any) -> dict[str, torch.Tensor]:
    """This rank's parts of a module's parameters, by name."""
    from torch.distributed.tensor import DTensor

    state = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def _fastload(folder: Path) -> Any:
    from fastload import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", tp_plan="auto")


def _fastload_load_model(folder: Path) -> Any:
    import fastload

    model = _laid_out(folder)
    fastload.load_model(model, folder)
    return model


def _transformers(folder: Path) -> Any:
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    return LlamaForCausalLM.from_pretrained(folder, dtype="auto", distributed_config=DistributedConfig(tp_plan="auto"))


def _dcp(folder: Path) -> Any:
    """transformers' module, made empty, filled by the reader that torch.distributed.checkpoint has for safetensors."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    model = _laid_out(folder)
    rotary = model.model.rotary_emb
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(rotary)(model.config)
    state = model.state_dict()
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)))
    return model


def _laid_out(folder: Path) -> Any:
    """transformers' module on meta, its parameters DTensors, its rotary buffers real, no initialiser run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.initialization import no_init_weights

    wanted, _, mesh = LlamaForCausalLM.prepare_distribute_model(DistributedConfig(tp_plan="auto"))
    config = LlamaConfig.from_pretrained(folder)
    torch.set_default_dtype(config.dtype)
    try:
        with no_init_weights(), torch.device("meta"):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return LlamaForCausalLM.maybe_distribute_model(model, wanted, mesh)


RANK_LOADERS: dict[str, Callable[[Path], Any]] = {
    "fastload": _fastload,
    "fastload load_model": _fastload_load_model,
    "transformers": _transformers,
    "DCP": _dcp,
}
