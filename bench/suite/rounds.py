"""Rounds: every loader once a round, so that noise and drift of the machine meet all of them alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

__all__ = ["Samples", "interleave"]

Samples = dict[str, dict[str, list[float]]]
"""Loader -> metric -> one value a round."""


def interleave(
    runs: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int, *, warm_up_rounds: int = 1
) -> Samples:
    """Run every loader in every round, beginning each round with another one. Warm-up rounds are not kept."""
    samples: Samples = {loader: {} for loader in runs}
    order = list(runs)
    for number in range(-warm_up_rounds, rounds):
        _show_progress(f"round {number + 1}/{rounds}" if number >= 0 else "warming up")
        for loader in order:
            for metric, value in runs[loader]().items():
                if number >= 0:
                    samples[loader].setdefault(metric, []).append(value)
        order = [*order[1:], order[0]]
    _show_progress("")
    return samples


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
