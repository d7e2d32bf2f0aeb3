"""What fastload leaves to transformers' own loading code, and why."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

from fastload.errors import OptionError
from fastload.plan.slots import walk_modules

__all__ = ["reason_to_hand_over"]


def reason_to_hand_over(model: Any, state_dict: Any, files: Any, asked: Any) -> str:
    """Why transformers should place these weights; "" where fastload does.

    Args:
        model: the model, on meta.
        state_dict, files: where the weights are.
        asked: transformers' LoadStateDictConfig.
    """
    if type(model)._load_pretrained_model is not PreTrainedModel._load_pretrained_model:
        return f"{type(model).__name__} loads its weights in its own way"
    if asked.hf_quantizer is not None:
        method = asked.hf_quantizer.quantization_config.quant_method
        return f"quantizer {getattr(method, 'value', method)}"
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3"
    if is_fsdp_enabled():
        return "FSDP with loading on one rank"
    if getattr(model, "_pp_stage", None) is not None:
        return "pipeline parallelism"
    if asked.device_mesh is not None and (reason := _reason_of_layout(model, state_dict)):
        return reason
    devices = {str(device) for device in (asked.device_map or {}).values()}
    if "mps" in devices:
        return "device mps"
    if state_dict is None and not files:
        return "no weights"
    return ""


def _reason_of_layout(model: Any, state_dict: Any) -> str:
    """Why parts of a model that is laid out over ranks cannot be read by themselves; "" where they can."""
    from fastload.distributed.layouts import parts_of

    if state_dict is not None:
        return "a state dict for a model over a device mesh"
    try:
        parts = parts_of(walk_modules(model))
    except OptionError as error:
        return f"a layout over ranks that fastload does not know ({error.found})"
    return "" if parts else "a device mesh, and no parameter that is laid out over it"
