"""A load and the first forward, the files not in the page cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from suite.checkpoints import llama_1b, n_weight_bytes
from suite.fingerprint import same_output
from suite.fresh import run_job
from suite.outcome import Outcome, Workload, at_least
from suite.rounds import interleave

__all__ = ["FIRST_FORWARD"]

_LOADERS = ("fastload", "transformers", "accelerate", "safetensors")


def _measure(rounds: int) -> Outcome:
    folder, tiny = llama_1b(), llama_1b(tiny=True)
    results: dict[str, dict[str, Any]] = {}

    def job(loader: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            results[loader] = run_job("cold", "llama", loader, str(folder), str(tiny))
            metrics: dict[str, float] = results[loader]["metrics"]
            return metrics

        return run

    measured = interleave(
        {loader: job(loader) for loader in (*_LOADERS, "disk")}, rounds, warm_up_rounds=0, attempts_per_round=1
    )
    same_output({loader: results[loader]["output"] for loader in _LOADERS})
    targets = (
        at_least(
            "transformers / fastload",
            1.7,
            lambda value: value("transformers", "seconds") / value("fastload", "seconds"),
            measured.samples,
        ),
        at_least(
            "share of the disk's best rate",
            75,
            lambda value: value("disk", "seconds") / value("fastload", "seconds") * 100,
            measured.samples,
            unit="%",
        ),
    )
    return Outcome(rounds=measured, metric="seconds", limit="disk", n_bytes=n_weight_bytes(folder), targets=targets)


FIRST_FORWARD = Workload(
    name="first-forward-cold",
    title="Llama 1.1B bf16, load and first forward of 4 tokens, the file's cached pages dropped",
    measure=_measure,
    rounds=5,
)
