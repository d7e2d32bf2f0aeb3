"""Loads in a process that has loaded before."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from suite.checkpoints import bert_base, llama_1b, n_weight_bytes
from suite.fingerprint import same_digest
from suite.fresh import run_job
from suite.outcome import Outcome, Target, Workload, at_least
from suite.registry import LOADERS, available
from suite.rounds import Rounds, Samples

__all__ = ["BERT", "DEVICE_MAP", "LLAMA", "in_process"]

Run = tuple[str, str, Path]
"""Family, loader and folder."""


def in_process(runs: Mapping[str, Run], rounds: int, *, forward: bool = False, attempts: int = 2) -> Rounds:
    """Second loads of all rows, in turns in one process. Rows of one family must give the same bytes."""
    request: dict[str, Any] = {"rounds": rounds, "attempts": attempts, "forward": forward}
    request["runs"] = {row: (family, loader, str(folder)) for row, (family, loader, folder) in runs.items()}
    result = run_job("load", json.dumps(request))
    contents: dict[str, dict[str, str]] = {}
    for row, (family, _, folder) in runs.items():
        # Folders of one family may hold models of several sizes: "bert-base-bin-1" is as "bert-base-safetensors-1".
        size = "-".join(folder.name.split("-")[:2])
        contents.setdefault(f"{family} {size}", {})[row] = result["digests"][row]
    for digests in contents.values():
        same_digest(digests)
    return Rounds(result["samples"], result["n_disturbed"])


def _measure(rounds: int, family: str, make: Callable[[str], Path]) -> Outcome:
    runs = {name: (family, name, make(how.file_format)) for name, how in available(LOADERS[family]).items()}
    # A forward of the Llama takes seconds: `first-forward-cold` has it.
    measured = in_process(runs, rounds, forward=family == "bert", attempts=3 if family == "bert" else 2)
    n_bytes = n_weight_bytes(make("safetensors"))
    targets = (_faster("fastload", 6, measured.samples), _faster("fastload.hf", 3, measured.samples))
    return Outcome(rounds=measured, metric="seconds", n_bytes=n_bytes, targets=targets)


def _measure_device_map(rounds: int) -> Outcome:
    folder = llama_1b("safetensors")
    measured = in_process({name: ("device map", name, folder) for name in LOADERS["device map"]}, rounds)
    targets = (_faster("fastload", 5, measured.samples),)
    return Outcome(rounds=measured, metric="seconds", n_bytes=n_weight_bytes(folder), targets=targets)


def _faster(ours: str, bound: float, samples: Samples) -> Target:
    """So many times transformers."""
    return at_least(
        f"transformers / {ours}",
        bound,
        lambda value: value("transformers", "seconds") / value(ours, "seconds"),
        samples,
    )


BERT = Workload(
    name="load-bert",
    title="BERT-base fp32, later loads in one process, files in the page cache",
    measure=partial(_measure, family="bert", make=bert_base),
    rounds=15,
)
LLAMA = Workload(
    name="load-llama",
    title="Llama 1.1B bf16, later loads in one process, files in the page cache",
    measure=partial(_measure, family="llama", make=llama_1b),
    rounds=7,
)
DEVICE_MAP = Workload(
    name="device-map",
    title="Llama 1.1B bf16 by transformers' class with a device map of 404 entries, later loads in one process",
    measure=_measure_device_map,
    rounds=7,
)
