"""``fastload plan --ranks``: what each of many ranks would read and ask, without any of them."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from fastload.checkpoint import Checkpoint
from fastload.cli.arguments import Where
from fastload.cli.native import build_native, plan_built
from fastload.cli.output import print_json, print_line, print_table
from fastload.errors import OptionError
from fastload.plan.ranks import Layout, count_reads
from fastload.plan.slots import describe_modules, walk_modules
from fastload.reports import format_bytes

if TYPE_CHECKING:
    from fastload.models.base import PreTrainedModel

__all__ = ["N_ASKED_OF_FOLDER", "N_ASKED_OF_SHARD", "plan_ranks"]

N_ASKED_OF_SHARD = 2
"""Questions by name that a load puts to the file system for each file of weights: what it is, and to open it."""

N_ASKED_OF_FOLDER = 22
"""The same of the folder, its listing, the index and the config, once a load."""


def plan_ranks(
    arguments: argparse.Namespace, where: Where, checkpoint: Checkpoint, model_class: type[PreTrainedModel] | None
) -> int:
    """Print what each rank, each node and all of them together would read of a checkpoint."""
    if model_class is None:
        raise OptionError(
            "ranks are planned for native models only",
            key="ranks",
            found=where.path,
            fix="leave --ranks out, or give a checkpoint whose config names a native family",
        )
    model, dtype = build_native(model_class, checkpoint, where, arguments.dtype)
    layout = Layout(arguments.ranks, arguments.tp, model.tp_plan)
    plan = plan_built(model, dtype, checkpoint, where)
    slots = describe_modules(walk_modules(model))
    ranks = count_reads(plan, slots, layout)
    nodes = count_reads(plan, slots, layout, arguments.ranks_per_node)
    n_asked = N_ASKED_OF_SHARD * len(checkpoint.files) + N_ASKED_OF_FOLDER
    columns: dict[str, tuple[Iterable[int], Callable[[int], str]]] = {
        "a rank owns": ([rank.n_bytes for rank in ranks], format_bytes),
        "a rank reads": ([rank.n_read_bytes for rank in ranks], format_bytes),
        "in runs": ([rank.n_runs for rank in ranks], _number),
        "of files": ([rank.n_files for rank in ranks], _number),
        "opens": ([len(checkpoint.files)] * len(ranks), _number),
        "asks the file system": ([n_asked] * len(ranks), _number),
        f"a node of {arguments.ranks_per_node} reads": ([node.n_read_bytes for node in nodes], format_bytes),
    }
    counts = {name: _summary(values) for name, (values, _) in columns.items()}
    if arguments.json:
        print_json({"source": where.path, "target": model_class.__name__, "n_bytes": plan.n_bytes, "counts": counts})
        return 0
    print_table(
        ("what", "least", "median", "most", "all together"),
        [(name, *map(form, counts[name].values())) for name, (_, form) in columns.items()],
        right=("least", "median", "most", "all together"),
    )
    print_line()
    print_line(
        f"{where.path}, {format_bytes(plan.n_bytes)} in {len(checkpoint.files):,} files, into a {model_class.__name__} "
        f"on {layout.n_ranks:,} ranks: {layout.n_tensor_parallel} by tensor parallelism, "
        f"{layout.n_ranks // layout.n_tensor_parallel:,} by fully_shard"
    )
    return 0


def _summary(values: Iterable[int]) -> dict[str, Any]:
    counts = list(values)
    return {
        "least": min(counts),
        "median": int(statistics.median(counts)),
        "most": max(counts),
        "all": sum(counts),
    }


def _number(value: int) -> str:
    return f"{value:,}"
