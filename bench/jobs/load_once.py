"""One load in a fresh process: ``load_once.py FAMILY LOADER FOLDER TINY DTYPE``, DTYPE a name of torch's or ``same``.

A tiny checkpoint of the same family is loaded first, so that imports are not counted.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from time import perf_counter

import torch
from suite.fingerprint import fingerprint_of
from suite.fresh import finish
from suite.memory import PrivatePeak, private_bytes
from suite.registry import LOADERS


def main(family: str, loader: str, folder: Path, tiny: Path, dtype_name: str) -> None:
    """Load once, between two looks at the clock and at the process's anonymous memory."""
    dtype = None if dtype_name == "same" else getattr(torch, dtype_name)
    load, complete = LOADERS[family][loader].load, LOADERS[family][loader].complete
    complete(load(tiny, dtype))
    gc.collect()
    before = private_bytes()
    with PrivatePeak(interval_s=0.01) as watch:
        begun = perf_counter()
        model = load(folder, dtype)
        seconds = perf_counter() - begun
    grown = private_bytes() - before
    complete(model)
    n_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    finish(
        metrics={"seconds": seconds, "growth_bytes": grown, "peak_growth_bytes": watch.peak_bytes - before},
        digest=fingerprint_of(model),
        n_bytes=n_bytes,
    )


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
