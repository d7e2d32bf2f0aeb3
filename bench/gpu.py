"""The GPU path beside its limits and its peers: ``python bench/gpu.py``, which needs one GPU and under 8 minutes.

Makes checkpoints, measures what link, page cache and storage give, loads in every way that is installed, and prints
the tables, each target as reached or missed, and last one JSON object. Every load is checked after its clock has
stopped, by a fingerprint of all tensors that the device computes. What does not fit into the time is left out by
importance, and named. A step that fails is named too, and the others go on.

Exit status: 0; 1 where a step failed or two loaders brought different bytes (a missed target is no failure); 2 where
there is no such device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from gpu_suite.loaders import LOADERS
from gpu_suite.plan import Plan
from gpu_suite.report import as_json, document, render
from gpu_suite.schedule import NotHereError, run_steps
from gpu_suite.workers import PROBE, RequestFailedError, Workers
from suite.checkpoints import cache_folder

_BUDGET_S = 450.0
_START_S = 120.0
_TESTS = Path(__file__).resolve().parents[1] / "tests"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print. Returns the exit status."""
    begun = monotonic()
    options = _parser().parse_args(arguments)
    newer = [options.newer_safetensors] if options.newer_safetensors else []
    workers = Workers(options.device, {"safetensors prefetch": newer})
    try:
        for name in (PROBE, *options.loaders):
            workers.start(name)
        about = workers.about(PROBE, _START_S)
        plan = Plan(
            workers=workers,
            device=options.device,
            small=options.small,
            folder=options.folder / ("gpu-small" if options.small else "gpu"),
            loaders=tuple(name for name in LOADERS if name in options.loaders),
            n_repeated=options.repeat,
            tests=_TESTS,
        )
        records = run_steps(plan.steps(), options.budget - (monotonic() - begun))
    except (NotHereError, RequestFailedError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        workers.close()
    asked = {"device": options.device, "small": options.small, "budget_s": options.budget, "repeat": options.repeat}
    found = document(records, about, asked, monotonic() - begun)
    print(render(records, found))
    if options.output:
        options.output.write_text(as_json(found) + "\n")
    else:
        print("", as_json(found), sep="\n")
    return 0 if found["is_whole"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The GPU path beside its limits and its peers.")
    parser.add_argument("--device", default="cuda:0", help="as torch names it; cpu shows the script's logic")
    parser.add_argument("--small", action="store_true", help="tiny checkpoints, which say nothing about speed")
    parser.add_argument(
        "--folder", type=Path, default=cache_folder(), help="for checkpoints: 30 GB, kept for the next run"
    )
    parser.add_argument(
        "--budget", type=float, default=_BUDGET_S, metavar="SECONDS", help="for all of it (%(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=50, metavar="N", help="loads one after the other (%(default)s)")
    parser.add_argument("--loaders", nargs="+", choices=list(LOADERS), default=list(LOADERS), metavar="LOADER")
    parser.add_argument(
        "--newer-safetensors", type=Path, metavar="FOLDER", help="with safetensors 0.9, for its prefetch"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the JSON object there, not on stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
