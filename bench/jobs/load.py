"""Loads in one process, side by side: ``load.py REQUEST``, a JSON object.

    {"rounds": 7, "attempts": 2, "forward": true, "runs": {ROW: [FAMILY, LOADER, FOLDER], ...}}

Every loader loads once before the first round, so that its imports and caches are there: what is measured is a second
load. After each load comes a forward, if asked for, since what a mapping spares the load it may cost the first use.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from suite.checkpoints import warm_up
from suite.fingerprint import fingerprint_of
from suite.fresh import finish
from suite.registry import LOADERS, forward
from suite.rounds import interleave


def main(request: dict[str, Any]) -> None:
    """Load in turns, then load once more with each and take fingerprints."""
    runs = {
        row: (Path(folder), partial(LOADERS[family][loader].load, Path(folder)))
        for row, (family, loader, folder) in request["runs"].items()
    }
    with_forward = request.get("forward", False)
    measured = interleave(
        {row: partial(_timed, folder, load, with_forward) for row, (folder, load) in runs.items()},
        request["rounds"],
        attempts_per_round=request["attempts"],
    )
    digests = {}
    for row, (_, load) in runs.items():
        gc.collect()
        digests[row] = fingerprint_of(load())
    finish(samples=measured.samples, n_disturbed=measured.n_disturbed, digests=digests)


def _timed(folder: Path, load: Any, with_forward: bool) -> dict[str, float]:
    warm_up(folder)  # anew: others push files out of the page cache, and some kernels take back what nobody used lately
    gc.collect()
    begun = perf_counter()
    result = load()
    at_result = perf_counter()
    if not with_forward:
        return {"seconds": at_result - begun}
    forward(result)
    at_output = perf_counter()
    return {"seconds": at_result - begun, "forward_s": at_output - at_result, "load_forward_s": at_output - begun}


main(json.loads(sys.argv[1]))
