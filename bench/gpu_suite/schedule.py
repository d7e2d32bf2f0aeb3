"""Steps in a time budget: what matters most comes to its turn, and no step's failure ends the others."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

__all__ = ["NotHereError", "Record", "Records", "Step", "run_steps"]

_MOST_ERROR_CHARACTERS = 1500


class NotHereError(Exception):
    """Something cannot be measured on this machine, which is no failure. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What became of a step.

    Attributes:
        group: what was measured.
        row: whose turn it was.
        status: ``"done"``, ``"failed"`` or ``"skipped"``.
        seconds: how long it ran.
        result: what it measured; empty unless done.
        words: why it failed or was skipped.
    """

    group: str
    row: str
    status: str
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    words: str = ""


Records = Mapping[tuple[str, str], Record]
"""(Group, row) -> record, of the steps that had their turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to measure.

    Attributes:
        group: what is measured: a table of its own.
        row: whose turn it is.
        priority: 0 is what matters most.
        estimate_s: (records so far) -> seconds that it will take, about.
        run: (records so far, most seconds it may take) -> what it measured, as plain data. Raises NotHereError where
            it cannot be measured, and anything else where it failed.
    """

    group: str
    row: str
    priority: int
    estimate_s: Callable[[Records], float]
    run: Callable[[Records, float], dict[str, Any]]


def run_steps(steps: Sequence[Step], budget_s: float) -> dict[tuple[str, str], Record]:
    """Run steps in their order, and skip those for which there is no time.

    A step has its turn if what is left of the budget suffices for it and for all later steps of a higher priority.
    Ctrl-C ends the step that runs and skips the rest; what was measured until then is returned.
    """
    end = monotonic() + budget_s
    records: dict[tuple[str, str], Record] = {}
    interrupted = False
    for number, step in enumerate(steps):
        kept_s = sum(later.estimate_s(records) for later in steps[number + 1 :] if later.priority < step.priority)
        left_s, needed_s = end - monotonic(), step.estimate_s(records)
        if interrupted:
            record = Record(group=step.group, row=step.row, status="skipped", words="interrupted")
        elif needed_s > left_s - kept_s:
            words = f"no time: about {needed_s:.0f} s, and of {left_s:.0f} s left {kept_s:.0f} are kept for what comes"
            record = Record(group=step.group, row=step.row, status="skipped", words=words)
        else:
            print(f"[{budget_s - left_s:5.0f} s] {step.group}: {step.row}", file=sys.stderr, flush=True)
            record, interrupted = _run(step, records, left_s)
        records[step.group, step.row] = record
        if record.words:
            print(f"          {record.status}: {record.words}", file=sys.stderr, flush=True)
    return records


def _run(step: Step, records: Records, left_s: float) -> tuple[Record, bool]:
    """The record of a step, and whether it was interrupted."""
    begun, interrupted = monotonic(), False
    status, result, words = "failed", {}, ""
    try:
        result = step.run(records, left_s)
        status = "done"
    except NotHereError as reason:
        status, words = "skipped", str(reason)
    except KeyboardInterrupt:
        words, interrupted = "interrupted", True
    except Exception as error:  # noqa: BLE001  what was measured before and will be after is worth more than this step
        words = "".join(traceback.format_exception_only(error)).strip()[-_MOST_ERROR_CHARACTERS:]
    seconds = round(monotonic() - begun, 2)
    record = Record(group=step.group, row=step.row, status=status, seconds=seconds, result=result, words=words)
    return record, interrupted
