"""A load and the first forward, in a fresh process: ``cold.py FAMILY LOADER FOLDER TINY STATE N_TOKENS``.

A tiny checkpoint of the same family is loaded and used first, so that imports and torch's threads are there. Then the
files' cached pages are dropped, unless STATE is "warm", and the clock starts. With ``disk`` for LOADER the file is only
read, in several ways.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from time import perf_counter

from suite.checkpoints import weight_files
from suite.cold import drop_cached, read_seconds
from suite.fresh import finish


def main(family: str, loader: str, folder: Path, tiny: Path, state: str, n_tokens: int) -> None:
    """Time from the call of the loader to the output."""
    if loader == "disk":
        ways = read_seconds(weight_files(folder)[0])
        finish(metrics={"seconds": min(ways.values()), **ways})
        return
    from suite.registry import LOADERS, forward

    load = LOADERS[family][loader].load
    forward(load(tiny), n_tokens)
    gc.collect()
    if state == "cold":
        drop_cached(weight_files(folder))
    begun = perf_counter()
    model = load(folder)
    at_model = perf_counter()
    output = forward(model, n_tokens)
    at_output = perf_counter()
    again = perf_counter()
    forward(model, n_tokens)
    at_end = perf_counter()
    finish(
        metrics={
            "seconds": at_output - begun,
            "load_s": at_model - begun,
            "forward_s": at_output - at_model,
            "second_forward_s": at_end - again,
        },
        output=output.float()[::97].tolist(),
    )


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
