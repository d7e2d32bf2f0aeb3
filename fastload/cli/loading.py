"""``fastload load``: load a checkpoint, for the report."""

from __future__ import annotations

import argparse

from fastload.checkpoint import Checkpoint
from fastload.cli.arguments import Where
from fastload.cli.native import native_class
from fastload.cli.output import print_json, print_line
from fastload.dtypes import DType, to_torch
from fastload.filling import report
from fastload.placement.cpu import place
from fastload.plan.planning import plan_state_dict
from fastload.reports import LoadReport, Stopwatch
from fastload.storage.memory import private_bytes

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Load the model that the config names, or else the state dict, and print the report."""
    where = Where.of(arguments)
    model_class = native_class(where)
    if model_class is None:
        target, result = "state dict", _load_state_dict(where, arguments.dtype)
    else:
        target, result = model_class.__name__, _load_model(model_class, where, arguments.dtype)
    if arguments.json:
        print_json({"target": target, **result.to_dict()})
    else:
        print_line(f"{result}\n  target   {target}")
    return 0


def _load_model(model_class: type, where: Where, dtype: DType | None) -> LoadReport:
    wanted = "auto" if dtype is None else to_torch(dtype)
    model = model_class.from_pretrained(where.path, dtype=wanted, **where.keywords)  # type: ignore[attr-defined]
    return report(model)


def _load_state_dict(where: Where, dtype: DType | None) -> LoadReport:
    before_bytes = private_bytes()
    clock = Stopwatch()
    with clock("open"):
        checkpoint = Checkpoint(where.locate())
    with clock("plan"):
        plan = plan_state_dict(checkpoint.specs, dtype=dtype, device="cpu")
    with clock("place"):
        tensors = place(plan, checkpoint.open_file)
    after_bytes = private_bytes()
    return LoadReport(
        source=where.path,
        files=checkpoint.files,
        format=checkpoint.format,
        n_tensors=len(tensors),
        n_bytes=plan.n_bytes,
        n_read_bytes=plan.asked_bytes(),
        bytes_by_action=plan.bytes_by_action(),
        stages_ms=clock.stages_ms,
        private_bytes=None if before_bytes is None or after_bytes is None else after_bytes - before_bytes,
        notes=checkpoint.notes,
    )
