"""Comparing a checkpoint with its checksums, beside reading as many bytes from memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from suite.checkpoints import cache_folder, llama_1b, n_weight_bytes, warm_up
from suite.fresh import run_job
from suite.outcome import Outcome, Workload, at_least
from suite.rounds import interleave

__all__ = ["VERIFY"]


def _measure(rounds: int) -> Outcome:
    import fastload

    scratch = Path(tempfile.mkdtemp(prefix=".verify-", dir=cache_folder()))
    try:
        fastload.save_state_dict(fastload.load_state_dict(llama_1b()), scratch, durability="data")
        warm_up(scratch)

        def job(way: str) -> Callable[[], dict[str, float]]:
            def run() -> dict[str, float]:
                metrics: dict[str, float] = run_job("verify", way, str(scratch / "model.safetensors"))["metrics"]
                return metrics

            return run

        measured = interleave(
            {"fastload": job("checksums"), "SHA-256": job("sha256"), "reading memory": job("read")},
            rounds,
            warm_up_rounds=0,
        )
        n_bytes = n_weight_bytes(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    share = at_least(
        "share of memory bandwidth: reading memory / fastload",
        0.6,
        lambda value: value("reading memory", "seconds") / value("fastload", "seconds"),
        measured.samples,
    )
    return Outcome(rounds=measured, metric="seconds", limit="reading memory", n_bytes=n_bytes, targets=(share,))


VERIFY = Workload(
    name="verify",
    title="Every byte of a Llama 1.1B bf16 compared with its checksums, from the page cache",
    measure=_measure,
    rounds=5,
)
