"""``fastload plan``: what a load would do with every tensor, without doing it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from math import prod

from fastload.checkpoint import Checkpoint
from fastload.cli.arguments import Where
from fastload.cli.native import native_class, plan_native
from fastload.cli.output import print_json, print_line, print_table, require_tables
from fastload.cli.ranks import plan_ranks
from fastload.plan.planning import plan_state_dict
from fastload.plan.rows import Action, LoadPlan, PlanRow
from fastload.reports import collapse_keys, format_bytes

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Print the plan for a checkpoint: for its model where that is native, else for the plain state dict."""
    if not arguments.json:
        require_tables()
    where = Where.of(arguments)
    checkpoint = Checkpoint(where.locate())
    model_class = native_class(where)
    if arguments.ranks is not None:
        return plan_ranks(arguments, where, checkpoint, model_class)
    if model_class is None:
        plan = plan_state_dict(checkpoint.specs, dtype=arguments.dtype, device="cpu")
    else:
        plan = plan_native(model_class, checkpoint, where, arguments.dtype)
    target = model_class.__name__ if model_class else "state dict"
    if arguments.json:
        print_json({"source": where.path, "target": target, "n_new_bytes": _n_new_bytes(plan.rows), **plan.to_dict()})
        return 0
    if arguments.all:
        print_table(("tensor", "what", "dtype", "bytes", "why"), map(_row, plan.rows), right=("bytes",))
        print_line()
    print_table(("what", "n", "bytes", "new memory", "why"), _summary(plan), right=("n", "bytes", "new memory"))
    print_line()
    print_line(f"{where.path} into a {target}: {len(plan.rows):,} tensors, {format_bytes(plan.n_bytes)}")
    for line in (*_key_lines(plan), *(f"  note       {note}" for note in checkpoint.notes)):
        print_line(line)
    return 0


def _row(row: PlanRow) -> tuple[str, ...]:
    return row.fqn, row.action.value, row.dtype.code, format_bytes(row.spec.region.n_bytes), row.reason


def _summary(plan: LoadPlan) -> Iterable[tuple[str, ...]]:
    """A row for each action and reason."""
    alike: dict[tuple[Action, str], list[PlanRow]] = {}
    for row in plan.rows:
        alike.setdefault((row.action, row.reason), []).append(row)
    for (action, reason), rows in alike.items():
        n_bytes = sum({row.spec.region[:3]: row.spec.region.n_bytes for row in rows}.values())
        why = reason or "used where they lie in the file"
        yield action.value, f"{len(rows):,}", format_bytes(n_bytes), format_bytes(_n_new_bytes(rows)), why


def _n_new_bytes(rows: Iterable[PlanRow]) -> int:
    """Bytes of memory that the rows' tensors need for themselves."""
    return sum(prod(row.spec.shape) * row.dtype.itemsize for row in rows if row.action is not Action.MAP)


def _key_lines(plan: LoadPlan) -> list[str]:
    groups = {
        "missing": plan.keys.missing,
        "unexpected": plan.keys.unexpected,
        "ignored": plan.keys.ignored,
        "mismatched": [
            f"{fqn}: {list(in_file)} in the file, {list(in_model)} in the model"
            for fqn, in_file, in_model in plan.mismatched
        ],
    }
    return [f"  {name:<10} {row}" for name, keys in groups.items() for row in collapse_keys(keys)]
