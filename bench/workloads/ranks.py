"""A tensor-parallel model on the ranks of one machine: the load, the ranks being there already."""

from __future__ import annotations

import shutil
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
    warm_up(folder)
    scratch = Path(tempfile.mkdtemp(prefix="fastload-ranks-"))
    groups: dict[str, list[Worker]] = {}
    digests: dict[str, dict[str, str]] = {f"rank {rank}": {} for rank in range(_N_RANKS)}
    shares: list[int] = []
    try:
        for number, loader in enumerate(RANK_LOADERS):
            groups[loader] = _start(loader, scratch / str(number), folder)
        measured = interleave(
            {loader: partial(_load, loader, group, digests, shares) for loader, group in groups.items()}, rounds
        )
    finally:
        for group in groups.values():
            for worker in group:
                worker.end()
        shutil.rmtree(scratch, ignore_errors=True)
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


def _start(loader: str, rendezvous: Path, folder: Path) -> list[Worker]:
    """A group of ranks that have loaded a tiny model."""
    tiny = llama_1b(tiny=True)
    group = [
        Worker("rank", loader, str(rank), str(_N_RANKS), str(rendezvous), str(folder), str(tiny))
        for rank in range(_N_RANKS)
    ]
    for worker in group:
        worker.heard()
    return group


def _load(loader: str, group: list[Worker], digests: dict[str, dict[str, str]], shares: list[int]) -> dict[str, float]:
    """One load by all ranks of a group: each metric of the rank that has most of it."""
    for worker in group:
        worker.go_on()
    found: list[dict[str, Any]] = [worker.heard() for worker in group]
    for rank, of_rank in enumerate(found):
        digests[f"rank {rank}"][loader] = of_rank["digest"]
        shares.append(of_rank["n_bytes"])
    return {metric: max(of_rank["metrics"][metric] for of_rank in found) for metric in found[0]["metrics"]}


TENSOR_PARALLEL = Workload(
    name="tp",
    title="Llama 1.1B bf16, tensor-parallel on 4 ranks of this machine (gloo): the load",
    measure=_measure,
    rounds=7,
)
