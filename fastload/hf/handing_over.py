"""What fastload leaves to transformers' own loading code, and why."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

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
    if asked.device_mesh is not None or getattr(model, "_pp_stage", None) is not None:
        return "a device mesh (tensor or pipeline parallelism)"
    devices = {str(device) for device in (asked.device_map or {}).values()}
    if "mps" in devices:
        return "device mps"
    if state_dict is None and not files:
        return "no weights"
    return ""
