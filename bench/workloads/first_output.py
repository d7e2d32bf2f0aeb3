"""Process start to first output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from suite.checkpoints import bert_base, warm_up
from suite.fingerprint import same_digest, same_output
from suite.fresh import run_job
from suite.outcome import Outcome, Workload, at_least, at_most
from suite.rounds import interleave

__all__ = ["BERT"]


def _measure(rounds: int) -> Outcome:
    folder = bert_base()
    warm_up(folder)
    path = str(folder)
    results: dict[str, dict[str, Any]] = {}

    def job(loader: str, *command: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            results[loader] = run_job(*command)
            metrics: dict[str, float] = results[loader]["metrics"]
            return metrics

        return run

    measured = interleave(
        {
            "fastload": job("fastload", "first_output", "fastload", path),
            "transformers": job("transformers", "first_output", "transformers", path),
            "floor": job("floor", "first_output_floor", path),
        },
        rounds,
    )
    same_digest({loader: result["digest"] for loader, result in results.items()})
    same_output({loader: result["output"] for loader, result in results.items()})
    targets = (
        at_most(
            "fastload / floor",
            1.25,
            lambda value: value("fastload", "seconds") / value("floor", "seconds"),
            measured.samples,
        ),
        at_least(
            "transformers / fastload",
            2.5,
            lambda value: value("transformers", "seconds") / value("fastload", "seconds"),
            measured.samples,
        ),
    )
    return Outcome(rounds=measured, metric="seconds", limit="floor", targets=targets)


BERT = Workload(
    name="ttfo-bert",
    title="BERT-base fp32, fresh process to first output, files in the page cache",
    measure=_measure,
    rounds=11,
)
