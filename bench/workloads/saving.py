"""Writing a checkpoint in shards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable

from suite.checkpoints import cache_folder, llama_1b, n_weight_bytes, warm_up
from suite.fresh import run_job
from suite.outcome import Outcome, Workload, at_least, at_most
from suite.rounds import interleave

__all__ = ["SAVE"]


def _measure(rounds: int) -> Outcome:
    folder = llama_1b()
    warm_up(folder)
    scratch = tempfile.mkdtemp(prefix=".save-", dir=cache_folder())

    def job(library: str, sync: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            metrics: dict[str, float] = run_job("save", library, sync, str(folder), os.path.join(scratch, "out"))[
                "metrics"
            ]
            return metrics

        return run

    try:
        measured = interleave(
            {
                "fastload": job("fastload", "lazy"),
                "safetensors": job("safetensors", "lazy"),
                "fastload, synced": job("fastload", "sync"),
                "safetensors, synced": job("safetensors", "sync"),
            },
            rounds,
            warm_up_rounds=0,
            attempts_per_round=1,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    targets = [
        at_least(
            f"safetensors / fastload{suffix}",
            1.3,
            lambda value, suffix=suffix: (
                value(f"safetensors{suffix}", "seconds") / value(f"fastload{suffix}", "seconds")
            ),
            measured.samples,
        )
        for suffix in ("", ", synced")
    ]
    targets += [
        at_most(
            f"fastload{suffix}: private memory at the peak of the save",
            64,
            lambda value, suffix=suffix: value(f"fastload{suffix}", "peak_growth_bytes") / 1e6,
            measured.samples,
            unit="MB",
        )
        for suffix in ("", ", synced")
    ]
    return Outcome(
        rounds=measured,
        metric="seconds",
        n_bytes=n_weight_bytes(folder),
        not_peers=("fastload, synced", "safetensors, synced"),
        targets=tuple(targets),
    )


SAVE = Workload(
    name="save",
    title="Llama 1.1B bf16 in shards of 1 GB, with and without waiting for the disk",
    measure=_measure,
    rounds=5,
)
