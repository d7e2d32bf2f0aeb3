"""Loads in one process, side by side: ``load.py ROUNDS LOADER=FOLDER...``.

Every loader loads once before the first round, so that its imports and caches are there: what is measured is a second
load. After each load comes a forward, since what a mapping spares the load it may cost the first use.
"""

from __future__ import annotations

import gc
import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from suite.fingerprint import fingerprint
from suite.fresh import finish
from suite.loaders import BERT_LOADERS
from suite.rounds import interleave


def main(rounds: int, folders: dict[str, Path]) -> None:
    """Load in turns, then load once more with each and take fingerprints."""
    runs = {loader: partial(_timed, loader, folder) for loader, folder in folders.items()}
    measured = interleave(runs, rounds)
    digests = {
        loader: fingerprint(BERT_LOADERS[loader].load(folder).state_dict()) for loader, folder in folders.items()
    }
    finish(samples=measured.samples, n_disturbed=measured.n_disturbed, digests=digests)


def _timed(loader: str, folder: Path) -> dict[str, float]:
    load = BERT_LOADERS[loader].load
    ids = torch.arange(1000, 1032).unsqueeze(0)
    gc.collect()
    begun = perf_counter()
    model = load(folder)
    at_model = perf_counter()
    with torch.inference_mode():
        model(ids)
    at_output = perf_counter()
    return {"seconds": at_model - begun, "forward_s": at_output - at_model, "load_forward_s": at_output - begun}


main(int(sys.argv[1]), {loader: Path(folder) for loader, _, folder in (arg.partition("=") for arg in sys.argv[2:])})
