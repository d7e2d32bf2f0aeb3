"""Several processes with the same model: what each of them costs in proportional memory (PSS)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

from suite.checkpoints import llama_1b, moe, n_weight_bytes, warm_up
from suite.fingerprint import same_digest
from suite.fresh import Worker
from suite.memory import proportional_bytes
from suite.outcome import Outcome, Workload, at_least, at_most
from suite.rounds import interleave

__all__ = ["WORKERS"]

_N_WORKERS = 8
# Every worker of these holds the whole MoE in memory of its own: 8 of them would not fit beside everything else. What
# each would have of 8 is computed: the private part does not depend on their number, the files' part is divided by it.
_N_PRIVATE_WORKERS = 2


def _measure(rounds: int) -> Outcome:
    digests: dict[str, dict[str, str]] = {"llama": {}, "moe": {}}

    def grown(family: str, loader: str, make: Callable[..., Path], n_workers: int) -> dict[str, float]:
        private, of_files, seen = _growth(family, loader, make(), make(tiny=True), n_workers)
        digests[family] |= {f"{loader} {number}": digest for number, digest in enumerate(seen)}
        of_files = of_files * n_workers // _N_WORKERS
        return {
            "pss_bytes": private + of_files,
            "private_bytes": private,
            "files_bytes": of_files,
            "workers": n_workers,
        }

    for folder in (llama_1b(), moe()):
        warm_up(folder)
    measured = interleave(
        {
            "fastload": partial(grown, "moe", "fastload", moe, _N_WORKERS),
            "transformers": partial(grown, "moe", "transformers", moe, _N_PRIVATE_WORKERS),
            "Llama fastload": partial(grown, "llama", "fastload", llama_1b, _N_WORKERS),
            "Llama transformers": partial(grown, "llama", "transformers", llama_1b, _N_WORKERS),
        },
        rounds,
        warm_up_rounds=0,
        attempts_per_round=1,
    )
    for family in digests.values():
        same_digest(family)
    moe_bytes, llama_bytes = n_weight_bytes(moe()), n_weight_bytes(llama_1b())
    targets = (
        at_least(
            "MoE: transformers / fastload",
            6,
            lambda value: value("transformers", "pss_bytes") / value("fastload", "pss_bytes"),
            measured.samples,
        ),
        at_most(
            "MoE: PSS / (weights / 8)",
            1.05,
            lambda value: value("fastload", "pss_bytes") / (moe_bytes / _N_WORKERS),
            measured.samples,
        ),
        at_most(
            "MoE: PSS beyond weights / 8, of the weights",
            5,
            lambda value: (value("fastload", "pss_bytes") / moe_bytes - 1 / _N_WORKERS) * 100,
            measured.samples,
            unit="%",
        ),
        at_most(
            "Llama: PSS / (weights / 8)",
            1.05,
            lambda value: value("Llama fastload", "pss_bytes") / (llama_bytes / _N_WORKERS),
            measured.samples,
        ),
    )
    return Outcome(
        rounds=measured,
        metric="pss_bytes",
        not_peers=("Llama fastload", "Llama transformers"),
        targets=targets,
    )


def _growth(family: str, loader: str, folder: Path, tiny: Path, n_workers: int) -> tuple[int, int, list[str]]:
    """Mean growth of a worker's PSS by the load, private and of files, all of them holding the model; their digests."""
    workers: list[Worker] = []
    try:
        workers += [Worker("worker", family, loader, str(folder), str(tiny)) for _ in range(n_workers)]
        for worker in workers:
            worker.heard()
        before = [proportional_bytes(worker.pid) for worker in workers]
        for worker in workers:
            worker.go_on()
        digests = [worker.heard() for worker in workers]
        after = [proportional_bytes(worker.pid) for worker in workers]
    finally:
        for worker in workers:
            worker.end()
    private, of_files = (
        round(mean(late) - mean(early))
        for early, late in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)
    )
    return private, of_files, digests


WORKERS = Workload(
    name="workers",
    title="8 processes with the MoE or with Llama 1.1B, every byte read: memory of each, PSS",
    measure=_measure,
    rounds=1,
)
