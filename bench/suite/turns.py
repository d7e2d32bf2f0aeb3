"""Jobs in fresh processes, side by side: every row once a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from suite.fresh import run_job
from suite.rounds import Rounds, interleave

__all__ = ["in_turns"]


def in_turns(commands: Mapping[str, tuple[str, ...]], rounds: int, said: str) -> tuple[Rounds, dict[str, Any]]:
    """Run a job for each row in turns. A round takes long: one that was disturbed is kept, not measured again.

    Args:
        commands: row -> job and its arguments.
        rounds: how many.
        said: the name of something, beside its metrics, that a job hands back.

    Returns:
        The measurements; and that something for each row whose last job had it.
    """
    results: dict[str, dict[str, Any]] = {}

    def job(row: str, command: tuple[str, ...]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            results[row] = run_job(*command)
            metrics: dict[str, float] = results[row]["metrics"]
            return metrics

        return run

    runs = {row: job(row, command) for row, command in commands.items()}
    measured = interleave(runs, rounds, warm_up_rounds=0, attempts_per_round=1)
    return measured, {row: found[said] for row, found in results.items() if said in found}
