"""Counts of what fastload did and what it handed over to transformers, with the reasons. No silent fallback."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Stats", "count_load", "count_save", "reset_stats", "stats"]


@dataclass(frozen=True, slots=True)
class Stats:
    """Loads and saves of this process since it began, or since `reset_stats`.

    Attributes:
        fast_loads: loads whose weights fastload placed.
        handed_over_loads: loads that transformers' own code did, because fastload does not know what they need.
        fast_saves, handed_over_saves: the same for saves.
        reasons: why something was handed over -> how often.
    """

    fast_loads: int = 0
    handed_over_loads: int = 0
    fast_saves: int = 0
    handed_over_saves: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        loads = f"{self.fast_loads} loads by fastload, {self.handed_over_loads} handed over"
        saves = f"{self.fast_saves} saves by fastload, {self.handed_over_saves} handed over"
        return "\n".join([f"{loads}; {saves}", *(f"  {count} x {reason}" for reason, count in self.reasons.items())])


_lock = threading.Lock()
_counts: Counter[str] = Counter()
_reasons: Counter[str] = Counter()


def stats() -> Stats:
    """The counts so far."""
    with _lock:
        return Stats(**_counts, reasons=dict(_reasons.most_common()))


def reset_stats() -> None:
    """Begin counting anew."""
    with _lock:
        _counts.clear()
        _reasons.clear()


def count_load(reason: str = "") -> None:
    """One load more; a reason says why it was handed over."""
    _count("loads", reason)


def count_save(reason: str = "") -> None:
    """One save more; a reason says why it was handed over."""
    _count("saves", reason)


def _count(what: str, reason: str) -> None:
    with _lock:
        _counts[f"handed_over_{what}" if reason else f"fast_{what}"] += 1
        if reason:
            _reasons[reason] += 1
