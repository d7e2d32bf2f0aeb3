"""What was promised, and whether it was kept; and whether all loaders brought the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from suite.outcome import Target

from gpu_suite.schedule import Records

__all__ = ["PROMISES", "Promise", "checked_contents", "differences", "targets"]

Value = Callable[[str, str, str], float]
"""(Group, row, metric) -> the figure that was measured."""

# What an interpreter and an allocator may gain in fifty loads that keep nothing.
_HOST_GROWTH_MB = 16
_DEVICE_GROWTH_MB = 1


class NotMeasuredError(LookupError):
    """A figure that a promise is about was not measured. The message says which, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A target for one GPU: the figure, and what it must be at least or at most."""

    what: str
    bound: float
    is_upper: bool
    unit: str
    figure: Callable[[Value], float]


def _limit_gb_per_s(value: Value) -> float:
    """What a load from the page cache cannot exceed: the slower of reading the cache and crossing the link."""
    return min(value("hardware", "page cache", "best_gb_per_s"), value("hardware", "link", "pinned_gb_per_s"))


def _gb_per_s(value: Value, group: str, row: str = "fastload") -> float:
    return value(group, row, "n_bytes") / value(group, row, "seconds") / 1e9


def _of_limit(group: str) -> Callable[[Value], float]:
    return lambda value: _gb_per_s(value, group) / _limit_gb_per_s(value) * 100


def _transformers(group: str) -> Callable[[Value], float]:
    return lambda value: value(group, "transformers", "seconds") / value(group, "fastload", "seconds")


def _streamed(group: str) -> Callable[[Value], float]:
    def figure(value: Value) -> float:
        longer_s = max(value(group, "fastload", "load_s"), value(group, "fastload", "forward_s"))
        return value(group, "fastload", "stream_s") / longer_s

    return figure


def _of_storage(value: Value) -> float:
    return _gb_per_s(value, "cold") / value("hardware", "storage", "best_gb_per_s") * 100


def _of_uncast(value: Value) -> float:
    return _gb_per_s(value, "fp32 to bf16") / _gb_per_s(value, "fp32 warm") * 100


def _growth_mb(where: str) -> Callable[[Value], float]:
    return lambda value: value("repeated loads", "fastload", f"{where}_growth_bytes") / 1e6


def _at_least(what: str, bound: float, figure: Callable[[Value], float], unit: str = "x") -> Promise:
    return Promise(what=what, bound=bound, is_upper=False, unit=unit, figure=figure)


def _at_most(what: str, bound: float, figure: Callable[[Value], float], unit: str = "x") -> Promise:
    return Promise(what=what, bound=bound, is_upper=True, unit=unit, figure=figure)


PROMISES: tuple[Promise, ...] = (
    _at_least("dense warm: share of min(page cache, pinned link)", 85, _of_limit("dense warm"), "%"),
    _at_least("dense warm: transformers / fastload", 4, _transformers("dense warm")),
    _at_least("moe warm: share of min(page cache, pinned link)", 70, _of_limit("moe warm"), "%"),
    _at_least("moe warm: transformers / fastload", 10, _transformers("moe warm")),
    _at_least("cold: share of the storage's rate", 90, _of_storage, "%"),
    _at_least("fp32 to bf16: share of the rate without conversion, in source bytes", 90, _of_uncast, "%"),
    _at_most("first forward warm: streamed / max(load, forward)", 1.1, _streamed("first forward warm")),
    _at_most("first forward cold: streamed / max(load, forward)", 1.1, _streamed("first forward cold")),
    _at_most("repeated loads: growth of host memory", _HOST_GROWTH_MB, _growth_mb("host"), "MB"),
    _at_most("repeated loads: growth of device memory", _DEVICE_GROWTH_MB, _growth_mb("device"), "MB"),
)


def targets(records: Records) -> tuple[list[Target], dict[str, str]]:
    """The promises whose figures were measured, and of the others what is missing."""
    found, missing = [], {}
    for promise in PROMISES:
        try:
            of_medians, of_minima = promise.figure(_values(records, median)), promise.figure(_values(records, min))
        except NotMeasuredError as reason:
            missing[promise.what] = str(reason)
            continue
        found.append(
            Target(
                what=promise.what,
                of_medians=of_medians,
                of_minima=of_minima,
                bound=promise.bound,
                is_upper=promise.is_upper,
                unit=promise.unit,
            )
        )
    return found, missing


def differences(records: Records) -> list[str]:
    """One line for each content of which two loads gave different bytes."""
    found = []
    for content, digests in _digests(records).items():
        if len(set(digests.values())) > 1:
            listed = ", ".join(f"{who} {digest[:12]}" for who, digest in digests.items())
            found.append(f"{content}: {listed}")
    return found


def checked_contents(records: Records) -> dict[str, int]:
    """Content -> how many steps' results were compared."""
    return {content: len(digests) for content, digests in _digests(records).items()}


def _digests(records: Records) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for (group, row), record in records.items():
        if "digest" in record.result:
            found.setdefault(record.result["content"], {})[f"{row} ({group})"] = record.result["digest"]
    return found


def _values(records: Records, pick: Callable[[Any], float]) -> Value:
    def value(group: str, row: str, metric: str) -> float:
        record = records.get((group, row))
        if record is None or metric not in record.result:
            why = f": {record.words.splitlines()[0]}" if record is not None and record.words else ""
            raise NotMeasuredError(f"{group} of {row} was not measured{why}")
        found = record.result[metric]
        return float(pick(found) if isinstance(found, list) else found)

    return value
