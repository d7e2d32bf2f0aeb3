"""A tensor-parallel model on the ranks of one machine: the load, the ranks being there already."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from suite.checkpoints import llama_1b, n_weight_bytes, warm_up
from suite.fingerprint import same_digest
from suite.fresh import Worker
from suite.outcome import Outcome, Workload, at_least, at_most
from suite.ranks import RANK_LOADERS
from suite.rounds import interleave

__all__ = ["TENSOR_PARALLEL"]

_N_RANKS = 4
_TARGET = 3


def _measure(rounds: int) -> Outcome:
    folder = llama_1b()
    digests: dict[str, dict[str, str]] = {f"rank {rank}": {} for rank in range(_N_RANKS)}
    shares: list[int] = []
    measured = interleave(
        {loader: partial(_load, loader, folder, digests, shares) for loader in RANK_LOADERS},
        rounds,
        warm_up_rounds=0,
        attempts_per_round=2,
    )
    for of_rank in digests.values():
        same_digest(of_rank)
    targets = [
        at_least(
            f"{peer} / fastload",
            _TARGET,
            lambda value, peer=peer: value(peer, "seconds") / value("fastload", "seconds"),
            measured.samples,
        )
        for peer in ("transformers", "DCP")
    ]
    targets.append(
        at_most(
            "private memory of a rank, beyond its parts",
            64,
            lambda value: (value("fastload", "private_bytes") - max(shares)) / 1e6,
            measured.samples,
            unit="MB",
        )
    )
    return Outcome(
        rounds=measured,
        metric="seconds",
        n_bytes=n_weight_bytes(folder),
        not_peers=("fastload load_model",),
        targets=tuple(targets),
    )


def _load(loader: str, folder: Path, digests: dict[str, dict[str, str]], shares: list[int]) -> dict[str, float]:
    """One load by a new group, after that of a tiny model: each metric of the rank that has most of it.

    New, because transformers' layout makes process groups at every load, the threads of which go on as long as the
    process does: in a group that is kept they would slow its own later loads, and those of the others.
    """
    tiny = llama_1b(tiny=True)
    warm_up(folder)  # for each anew: some kernels take back what was not used for seconds
    with tempfile.TemporaryDirectory(prefix="fastload-ranks-") as scratch:
        group = [
            Worker("rank", loader, str(rank), str(_N_RANKS), f"{scratch}/rendezvous", str(folder), str(tiny))
            for rank in range(_N_RANKS)
        ]
        try:
            found: list[dict[str, Any]] = [worker.heard() for worker in group]
        finally:
            for worker in group:
                worker.end()
    for rank, of_rank in enumerate(found):
        digests[f"rank {rank}"][loader] = of_rank["digest"]
        shares.append(of_rank["n_bytes"])
    return {metric: max(of_rank["metrics"][metric] for of_rank in found) for metric in found[0]["metrics"]}


TENSOR_PARALLEL = Workload(
    name="tp",
    title="Llama 1.1B bf16, tensor-parallel on 4 ranks of this machine (gloo): the load",
    measure=_measure,
    rounds=5,
)
