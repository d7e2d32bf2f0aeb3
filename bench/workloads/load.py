"""Loads in a process that has loaded before."""

from __future__ import annotations

from suite.checkpoints import bert_base, n_weight_bytes, warm_up
from suite.fingerprint import same_digest
from suite.fresh import run_job
from suite.loaders import BERT_LOADERS
from suite.outcome import Outcome, Workload, at_least
from suite.rounds import Rounds

__all__ = ["BERT"]


def _measure(rounds: int) -> Outcome:
    folders = {loader: bert_base(how.file_format) for loader, how in BERT_LOADERS.items()}
    for folder in set(folders.values()):
        warm_up(folder)
    result = run_job("load", str(rounds), *(f"{loader}={folder}" for loader, folder in folders.items()))
    same_digest(result["digests"])
    measured = Rounds(result["samples"], result["n_disturbed"])
    target = at_least(
        "transformers / fastload",
        4,
        lambda value: value("transformers", "seconds") / value("fastload", "seconds"),
        measured.samples,
    )
    n_bytes = n_weight_bytes(folders["fastload"])
    return Outcome(rounds=measured, metric="seconds", n_bytes=n_bytes, targets=(target,))


BERT = Workload(
    name="load-bert",
    title="BERT-base fp32, later loads in one process, files in the page cache",
    measure=_measure,
    rounds=15,
)
