"""Rounds: every loader once a round, so that noise and drift of the machine meet all of them alike."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter

__all__ = ["Rounds", "Samples", "interleave"]

Samples = dict[str, dict[str, list[float]]]
"""Loader -> metric -> one value a round."""

# A round counts as disturbed when others used more than this share of one core while it ran.
_DISTURBED_SHARE = 0.05
_PAUSE_S = 1.0


@dataclass(frozen=True)
class Rounds:
    """What the rounds measured.

    Attributes:
        samples: the values.
        n_disturbed: in how many of the kept rounds other processes used the processor.
    """

    samples: Samples
    n_disturbed: int


def interleave(
    runs: Mapping[str, Callable[[], Mapping[str, float]]],
    rounds: int,
    *,
    warm_up_rounds: int = 1,
    attempts_per_round: int = 3,
) -> Rounds:
    """Run every loader in every round, beginning each round with another one. Warm-up rounds are not kept.

    A round in which other processes were at work is measured again, for up to ``attempts_per_round`` times as many
    attempts as rounds in all; what it measured plays no part in that. Where there are too few quiet rounds, the least
    disturbed fill up.
    """
    order = list(runs)
    quiet: list[dict[str, Mapping[str, float]]] = []
    disturbed: list[tuple[float, dict[str, Mapping[str, float]]]] = []
    for attempt in range(-warm_up_rounds, rounds * attempts_per_round):
        if len(quiet) == rounds:
            break
        _show_progress(f"round {len(quiet) + 1}/{rounds}" if attempt >= 0 else "warming up")
        begun, others = time.monotonic(), _seconds_of_others()
        measured = {loader: runs[loader]() for loader in order}
        share = (_seconds_of_others() - others) / (time.monotonic() - begun)
        order = [*order[1:], order[0]]
        if attempt < 0:
            continue
        if share <= _DISTURBED_SHARE:
            quiet.append(measured)
        else:
            disturbed.append((share, measured))
            time.sleep(_PAUSE_S)
    _show_progress("")
    disturbed.sort(key=itemgetter(0))
    kept = [*quiet, *(measured for _, measured in disturbed[: rounds - len(quiet)])]
    metrics = {loader: list(kept[0][loader]) for loader in runs}
    samples = {
        loader: {metric: [measured[loader][metric] for measured in kept] for metric in metrics[loader]}
        for loader in runs
    }
    return Rounds(samples, len(kept) - len(quiet))


def _seconds_of_others() -> float:
    """Processor time that went neither to this process nor to its children that have ended, over all cores.

    Time that a hypervisor gave to other machines is in it. 0 where the kernel does not tell.
    """
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except (OSError, ValueError):
        return 0.0
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - (own.user + own.system + own.children_user + own.children_system)


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
