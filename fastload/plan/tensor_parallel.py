"""Tensor parallelism as data: which layers of a model are cut, how, and what of each tensor a rank then owns.

A plan maps patterns of module names to styles, as transformers' ``base_model_tp_plan`` does; a ``*`` in a pattern
stands for one part of a name. Pure: it needs neither torch nor a process group, so that what each of a thousand ranks
would read can be counted on one machine. `fastload.distributed.parallel` applies a plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastload.errors import OptionError
from fastload.plan.boxes import Split

__all__ = ["STYLES", "TensorParallelPlan", "check_plan", "expand_plan", "splits_of"]

TensorParallelPlan = Mapping[str, str]
"""Pattern of module names -> style. Where several patterns fit a name, the last of them counts."""

STYLES: Mapping[str, str] = {
    "colwise": "a linear layer by outputs, which stay apart: weight and bias by rows",
    "colwise_gather_output": "a linear layer by outputs, which are put together again",
    "rowwise": "a linear layer by inputs, which are apart already: weight by columns, bias whole; outputs are summed",
    "rowwise_split_input": "a linear layer by inputs, which are whole before",
    "embedding_rowwise": "an embedding by tokens: weight by rows; outputs are summed",
    "embedding_colwise": "an embedding by features: weight by columns; outputs are put together again",
    "experts": "stacked experts by their number: every parameter along its first dimension; outputs are summed",
    "replicate": "whole on every rank",
    "replicated_with_grad_allreduce": "whole on every rank, which sees a part of the inputs: gradients are summed",
}
"""Every style, and what it cuts."""

_WHOLE = frozenset({"replicate", "replicated_with_grad_allreduce"})


def splits_of(plan: TensorParallelPlan, fqn: str, shape: tuple[int, ...], n_parts: int, part: int) -> tuple[Split, ...]:
    """How a plan cuts a parameter.

    Args:
        plan: pattern of module names -> style.
        fqn: name of the parameter in the model that the plan is for.
        shape: its whole shape.
        n_parts: ranks among which the model is split.
        part: number of the rank among them.

    Returns:
        The cuts that leave what the rank owns (see `plan.boxes.box_of`); none for a parameter that is whole there.

    Raises:
        OptionError: a style that is not known.
    """
    module, _, name = fqn.rpartition(".")
    style = _style_of(plan, module)
    if style is None or style in _WHOLE:
        return ()
    if style.startswith("colwise"):
        return (Split(max(len(shape) - 2, 0), n_parts, part),)
    if style.startswith("rowwise"):
        return () if name == "bias" else (Split(len(shape) - 1, n_parts, part),)
    return (Split(1 if style == "embedding_colwise" else 0, n_parts, part),)


def expand_plan(plan: TensorParallelPlan, modules: Iterable[str]) -> dict[str, str]:
    """The style of each of the named modules that a plan has one for.

    Args:
        plan: pattern of module names -> style.
        modules: names of all modules of a model.

    Raises:
        OptionError: a style that is not known, or a pattern that fits no module.
    """
    names = list(modules)
    check_plan(plan, names)
    return {name: style for name in names if (style := _style_of(plan, name)) is not None}


def check_plan(plan: TensorParallelPlan, modules: Iterable[str]) -> None:
    """Raise OptionError for a style that is not known, or a pattern that fits none of the named modules."""
    for style in plan.values():
        _check_style(style)
    names = [name.split(".") for name in modules]
    idle = [pattern for pattern in plan if not any(_fits(pattern.split("."), name) for name in names)]
    if idle:
        kinds = {".".join("*" if part.isdecimal() else part for part in name) for name in names}
        raise OptionError(
            "a pattern of a tensor parallel plan fits no module of the model",
            key=", ".join(idle),
            expected=", ".join(sorted(kind for kind in kinds if kind)),
            fix="name modules as the model does, beginning with its own prefix, with * for numbers",
        )


def _style_of(plan: TensorParallelPlan, module: str) -> str | None:
    parts = module.split(".")
    found = [style for pattern, style in plan.items() if _fits(pattern.split("."), parts)]
    if not found:
        return None
    _check_style(found[-1])
    return found[-1]


def _fits(pattern: list[str], parts: list[str]) -> bool:
    return len(pattern) == len(parts) and all(a in ("*", b) for a, b in zip(pattern, parts, strict=True))


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise OptionError(
            "unknown style in a tensor parallel plan",
            key="tp_plan",
            expected=", ".join(STYLES),
            found=repr(style),
            fix="choose one of these, or leave the module out to have it whole on every rank",
        )
