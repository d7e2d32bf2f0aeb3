"""What a checkpoint's config says of its model, and a plan for that model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastload.checkpoint import Checkpoint
from fastload.cli.arguments import Where
from fastload.dtypes import DTYPES, DType
from fastload.errors import ConfigError
from fastload.models.config_file import find_config_file, read_config_file
from fastload.models.registry import class_for, family_of
from fastload.options import LoadOptions, parse_dtype

if TYPE_CHECKING:
    from fastload.models.base import PreTrainedModel
    from fastload.plan.rows import LoadPlan

__all__ = ["build_native", "native_class", "plan_built", "plan_native"]


def native_class(where: Where) -> type[PreTrainedModel] | None:
    """The class that a checkpoint's config names, or its family's base model; None where no native family is named.

    Raises ConfigError where there is a config that cannot be read.
    """
    try:
        file = find_config_file(where.path, subfolder=where.files.subfolder, hub=where.hub)
    except ConfigError:
        return None
    values = read_config_file(file)
    try:
        family = family_of(values, file=file)
    except ConfigError:
        return None
    from fastload.models.auto import AutoModel

    named = values.get("architectures") or ()
    for auto in AutoModel.__subclasses__():
        try:
            found: type[PreTrainedModel] = class_for(auto.task, family)
        except ConfigError:  # the family has no model for this task
            continue
        if found.__name__ in named:
            return found
    return class_for(AutoModel.task, family, file=file)


def plan_native(
    model_class: type[PreTrainedModel], checkpoint: Checkpoint, where: Where, dtype: DType | None
) -> LoadPlan:
    """The plan that ``model_class.from_pretrained`` would make. No weight is read.

    Shapes that differ are in the plan, although a load would refuse them.
    """
    return plan_built(*build_native(model_class, checkpoint, where, dtype), checkpoint, where)


def build_native(
    model_class: type[PreTrainedModel], checkpoint: Checkpoint, where: Where, dtype: DType | None
) -> tuple[PreTrainedModel, DType]:
    """The model on meta that ``model_class.from_pretrained`` would fill, and the type that it would load it in."""
    from fastload.dtypes import to_torch
    from fastload.models.auto import AutoConfig
    from fastload.models.skeleton import skeleton

    config: Any = AutoConfig.from_pretrained(where.path, subfolder=where.files.subfolder, revision=where.hub.revision)
    chosen = dtype or parse_dtype(config.dtype) or _first_float_type(checkpoint)
    config.dtype = to_torch(chosen)
    with skeleton():
        return model_class(config), chosen


def plan_built(model: PreTrainedModel, dtype: DType, checkpoint: Checkpoint, where: Where) -> LoadPlan:
    """The plan for a model that was built for it."""
    from fastload.plan.planning import plan_model
    from fastload.plan.slots import describe_modules, walk_modules

    options = LoadOptions(dtype=dtype, ignore_mismatched_sizes=True)
    slots = describe_modules(walk_modules(model))
    rules = model._key_rules()
    return plan_model(checkpoint.specs, slots, options, rules, where.path, others=checkpoint.others)


def _first_float_type(checkpoint: Checkpoint) -> DType:
    return next((spec.dtype for spec in checkpoint.specs.values() if spec.dtype.castable), DTYPES["F32"])
