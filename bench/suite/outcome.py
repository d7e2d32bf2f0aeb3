"""What a workload found, as data: summaries, ratios, targets, and the JSON document made of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from statistics import median
from typing import Any

from suite.machine import describe_machine
from suite.rounds import Rounds, Samples

__all__ = ["Outcome", "Target", "Workload", "at_least", "at_most"]

OURS = "fastload"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure that was promised, from the medians and from the minima.

    Attributes:
        what: the figure in words.
        of_medians: its value from the medians.
        of_minima: its value from the minima: closer to what the machine can do when nothing else runs.
        bound: the promise.
        is_upper: True if the figure may be at most the bound, False if it must be at least that.
        unit: what follows the number when it is printed.
    """

    what: str
    of_medians: float
    of_minima: float
    bound: float
    is_upper: bool
    unit: str = "x"

    @property
    def reached(self) -> bool:
        """Whether the figure of the medians keeps the promise."""
        return self.of_medians <= self.bound if self.is_upper else self.of_medians >= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "what": self.what,
            "of_medians": self.of_medians,
            "of_minima": self.of_minima,
            "at_most" if self.is_upper else "at_least": self.bound,
            "unit": self.unit,
            "reached": self.reached,
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The measurements of one workload, its results already checked.

    Attributes:
        rounds: what was measured. ``fastload`` is among the loaders.
        metric: the metric that ratios are of; less is better.
        limit: the loader that does only what cannot be spared, if the workload has one.
        not_peers: rows that fastload's own row is not to be compared with.
        n_bytes: bytes that a load brings, for GB/s, where the metric is seconds.
        targets: what was promised.
    """

    rounds: Rounds
    metric: str
    limit: str | None = None
    not_peers: Collection[str] = ()
    n_bytes: int | None = None
    targets: tuple[Target, ...] = ()

    def document(self, workload: str) -> dict[str, Any]:
        """The JSON document of this outcome."""
        samples = self.rounds.samples
        ours = samples[OURS][self.metric]
        peers = {
            loader: metrics[self.metric]
            for loader, metrics in samples.items()
            if loader not in (OURS, self.limit, *self.not_peers) and self.metric in metrics
        }
        limit = median(samples[self.limit][self.metric]) if self.limit else None
        return {
            "workload": workload,
            "rounds": len(ours),
            "disturbed_rounds": self.rounds.n_disturbed,
            "metric": self.metric,
            "rows": {loader: self._row(metrics) for loader, metrics in samples.items()},
            "ratios": {peer: _ratio(median(theirs), median(ours)) for peer, theirs in peers.items()},
            "ratios_of_minima": {peer: _ratio(min(theirs), min(ours)) for peer, theirs in peers.items()},
            "limit": limit,
            "of_limit": _ratio(limit, median(ours)) if limit is not None else None,
            "targets": [target.to_dict() for target in self.targets],
            "machine": describe_machine(),
        }

    def _row(self, metrics: dict[str, list[float]]) -> dict[str, Any]:
        row: dict[str, Any] = {
            metric: {
                "min": _rounded(min(values)),
                "median": _rounded(median(values)),
                "samples": [_rounded(value) for value in values],
            }
            for metric, values in metrics.items()
        }
        if self.n_bytes is not None and self.metric in metrics:
            row["gb_per_s"] = self.n_bytes / median(metrics[self.metric]) / 1e9
        return row


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A question that the suite can answer.

    Attributes:
        name: as given on the command line.
        title: the question in a line.
        measure: (rounds) -> outcome; raises ResultsDifferError if the loaders disagree.
        rounds: how many, unless told otherwise.
        needs_consent: why it runs only where ``--large`` is said; "" where it always does.
    """

    name: str
    title: str
    measure: Callable[[int], Outcome]
    rounds: int = 7
    needs_consent: str = ""


Figure = Callable[[Callable[[str, str], float]], float]
"""A figure computed from ``value(loader, metric)``."""


def at_most(what: str, bound: float, figure: Figure, samples: Samples, unit: str = "x") -> Target:
    """The promise that a figure stays under a bound."""
    return _target(what, bound, figure, samples, unit, is_upper=True)


def at_least(what: str, bound: float, figure: Figure, samples: Samples, unit: str = "x") -> Target:
    """The promise that a figure reaches a bound."""
    return _target(what, bound, figure, samples, unit, is_upper=False)


def _target(what: str, bound: float, figure: Figure, samples: Samples, unit: str, *, is_upper: bool) -> Target:
    return Target(
        what=what,
        of_medians=figure(lambda loader, metric: median(samples[loader][metric])),
        of_minima=figure(lambda loader, metric: min(samples[loader][metric])),
        bound=bound,
        is_upper=is_upper,
        unit=unit,
    )


def _ratio(theirs: float, ours: float) -> float | None:
    """How many times ours; None where ours is nothing, or less (memory can shrink)."""
    return theirs / ours if ours > 0 else None


def _rounded(value: float) -> float:
    """To five digits; more would be noise. Bytes are counted, not measured, and stay as they are."""
    return value if isinstance(value, int) else float(f"{value:.5g}")
