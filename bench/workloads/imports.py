"""What ``import fastload`` costs, in fresh interpreters."""

from __future__ import annotations

from functools import partial

from suite.fresh import seconds_of_process
from suite.outcome import Outcome, Workload, at_most
from suite.rounds import interleave

__all__ = ["IMPORT", "IMPORT_SCRIPTS"]

# The check is part of the script: it fails if torch came along. `sys` is there anyway and costs nothing.
IMPORT_SCRIPTS = {
    "fastload": "import fastload, sys; sys.exit('torch' in sys.modules)",
    "transformers": "import transformers",
    "bare python": "pass",
}


def _measure(rounds: int) -> Outcome:
    def timed(script: str) -> dict[str, float]:
        return {"seconds": seconds_of_process("-c", script)}

    measured = interleave({name: partial(timed, script) for name, script in IMPORT_SCRIPTS.items()}, rounds)
    beyond = at_most(
        "import beyond bare python",
        30,
        lambda value: (value("fastload", "seconds") - value("bare python", "seconds")) * 1e3,
        measured.samples,
        unit="ms",
    )
    return Outcome(rounds=measured, metric="seconds", limit="bare python", targets=(beyond,))


IMPORT = Workload(
    name="import",
    title="whole process that imports the library, against one that does nothing",
    measure=_measure,
    rounds=21,
)
