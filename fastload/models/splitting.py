"""Native models split over ranks: what is asked of from_pretrained, checked, and done to the skeleton."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from fastload.errors import OptionError
from fastload.plan.slots import describe_modules, walk_modules
from fastload.plan.tensor_parallel import TensorParallelPlan, expand_plan, splits_of

if TYPE_CHECKING:
    from fastload.models.base import PreTrainedModel

__all__ = ["device_on", "mesh_asked_for", "split"]


def mesh_asked_for(device_mesh: Any, tp_plan: object, others: Mapping[str, object]) -> Any:
    """The mesh over whose ranks a model shall be split; None where it shall be whole.

    Args:
        device_mesh, tp_plan: see `PretrainedLoading.from_pretrained`.
        others: options that say otherwise where weights go, or when they arrive, and their values.

    Raises:
        OptionError: one of these is given too, or there is no process group.
    """
    if device_mesh is None and tp_plan is None:
        return None
    given = [name for name, value in others.items() if value]
    if given:
        raise OptionError(
            "these options exclude each other",
            found=", ".join([*given, "tp_plan or device_mesh"]),
            fix="leave out one; each rank of a mesh has its part on its own device when the load returns",
        )
    from fastload.distributed.parallel import mesh_of

    return mesh_of(device_mesh)


def device_on(mesh: Any) -> str:
    """This rank's device of a mesh."""
    from fastload.distributed.layouts import device_on

    return device_on(mesh)


def split(model: PreTrainedModel, mesh: Any, tp_plan: str | TensorParallelPlan | None) -> None:
    """Split a skeleton over the ranks of a mesh, in place.

    Args:
        model: on meta.
        mesh: a DeviceMesh of one dimension.
        tp_plan: "auto" or None for the model's own, or a plan.

    Raises:
        OptionError: no plan, one that does not fit the model, or a model that cannot be cut in so many parts.
    """
    plan = _plan_for(model, tp_plan)
    modules = walk_modules(model)
    styles = expand_plan(plan, modules)
    n_parts = mesh.size()
    _check_inputs(modules, styles, n_parts)
    _check_heads(model, styles, n_parts)
    _check_ties(modules, plan, n_parts)
    from fastload.distributed.parallel import parallelize

    parallelize(model, mesh, styles)
    model.tie_weights()
    if any(name.endswith(".k_proj") and style == "colwise" for name, style in styles.items()):
        decoder: Any = model.base_model
        decoder.n_key_heads //= n_parts
    model.tp_size, model._tp_plan_in_use, model._tp_mesh = n_parts, dict(plan), mesh


def _plan_for(model: PreTrainedModel, tp_plan: object) -> TensorParallelPlan:
    if tp_plan is not None and tp_plan != "auto" and not isinstance(tp_plan, Mapping):
        raise OptionError(
            "not a tensor parallel plan",
            key="tp_plan",
            expected='"auto", or module name pattern -> style',
            found=repr(tp_plan),
        )
    plan = tp_plan if isinstance(tp_plan, Mapping) else model.tp_plan
    if not plan:
        raise OptionError(
            f"{type(model).__name__} has no tensor parallel plan",
            key="tp_plan",
            fix="give one: module name pattern -> style",
        )
    return plan


def _check_inputs(modules: Mapping[str, nn.Module], styles: Mapping[str, str], n_parts: int) -> None:
    """What a layer that is cut by inputs is given are parts of one size."""
    for name, style in styles.items():
        n_inputs: Any = getattr(modules[name], "in_features", 0)
        if style == "rowwise" and n_inputs % n_parts:
            raise _uneven(name, f"{n_inputs} inputs", n_parts)


def _check_heads(model: PreTrainedModel, styles: Mapping[str, str], n_parts: int) -> None:
    """Heads stay whole, and those of queries are with those of keys and values that they look at."""
    cut: dict[str, list[bool]] = {}
    for name, style in styles.items():
        owner, _, last = name.rpartition(".")
        if last not in model._head_counts:
            continue
        is_cut = style == "colwise"
        cut.setdefault(owner, []).append(is_cut)
        field = model._head_counts[last]
        n_heads: Any = getattr(model.config, field, None) or getattr(model.config, "num_attention_heads", None)
        if is_cut and n_heads % n_parts:
            raise _uneven(name, f"{field} = {n_heads}", n_parts)
    for owner, are_cut in cut.items():
        if any(are_cut) and not (all(are_cut) and len(are_cut) == len(model._head_counts)):
            raise OptionError(
                "a tensor parallel plan cuts some of an attention's inputs and not the others",
                key=owner,
                expected=f"{', '.join(model._head_counts)}: all of them colwise, or none",
                fix="give all of them one style",
            )


def _check_ties(modules: Mapping[str, nn.Module], plan: TensorParallelPlan, n_parts: int) -> None:
    """A parameter that two modules share is cut alike in both."""
    for slot in describe_modules(modules).values():
        if slot.tied_to is None:
            continue
        names = (slot.fqn, slot.tied_to)
        first, second = (splits_of(plan, name, slot.shape, n_parts, 0) for name in names)
        if first != second:
            raise OptionError(
                "a tensor parallel plan cuts a parameter in two ways that two modules share",
                key=", ".join(names),
                fix='cut both alike, such as "embedding_rowwise" and "colwise_gather_output", or neither',
            )


def _uneven(name: str, count: str, n_parts: int) -> OptionError:
    return OptionError(
        "a layer cannot be cut in so many equal parts",
        key=name,
        expected=f"a multiple of {n_parts} ranks",
        found=count,
        fix="use a number of ranks that divides it, or give a tp_plan that leaves this layer whole",
    )
