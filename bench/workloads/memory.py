"""Private memory that a load takes, in fresh processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from suite.checkpoints import bert_base, warm_up
from suite.fingerprint import same_digest
from suite.fresh import run_job
from suite.loaders import BERT_LOADERS
from suite.outcome import Outcome, Workload, at_most
from suite.rounds import interleave

__all__ = ["CAST", "SAME_TYPE"]


def _measure(rounds: int, dtype: str) -> Outcome:
    results: dict[str, dict[str, Any]] = {}

    def job(loader: str) -> Callable[[], dict[str, float]]:
        folder = bert_base(BERT_LOADERS[loader].file_format)

        def run() -> dict[str, float]:
            warm_up(folder)  # for each anew: who finds a file cold has threads that read it, and their buffers
            results[loader] = run_job("memory", loader, str(folder), dtype)
            metrics: dict[str, float] = results[loader]["metrics"]
            return metrics

        return run

    measured = interleave({loader: job(loader) for loader in BERT_LOADERS}, rounds, warm_up_rounds=0)
    same_digest({loader: result["digest"] for loader, result in results.items()})
    targets = tuple(
        at_most(
            f"{loader}: growth beyond the cast's result",
            32,
            lambda value, loader=loader: value(loader, "beyond_cast_bytes") / 1e6,
            measured.samples,
            unit="MB",
        )
        for loader in BERT_LOADERS
        if loader.startswith("fastload")
    )
    return Outcome(rounds=measured, metric="growth_bytes", targets=targets)


SAME_TYPE = Workload(
    name="memory",
    title="BERT-base fp32, private memory that a first load adds, files in the page cache",
    measure=partial(_measure, dtype="same"),
    rounds=5,
)
CAST = Workload(
    name="memory-cast",
    title="BERT-base fp32 -> bf16, private memory that a first load adds, files in the page cache",
    measure=partial(_measure, dtype="bfloat16"),
    rounds=5,
)
