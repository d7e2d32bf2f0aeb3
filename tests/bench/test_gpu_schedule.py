"""Steps in a time budget: what is left out, and what a failure leaves alone."""

from __future__ import annotations

from typing import Any

from gpu_suite.schedule import NotHereError, Record, Records, Step, run_steps


def _step(row: str, what: Any = None, *, priority: int = 0, estimate_s: float = 0) -> Step:
    def run(records: Records, left_s: float) -> dict[str, Any]:
        if isinstance(what, BaseException):
            raise what
        return {"after": len(records), "left_s": left_s}

    return Step(group="group", row=row, priority=priority, estimate_s=lambda _: estimate_s, run=run)


def _by_row(steps: list[Step], budget_s: float = 100) -> dict[str, Record]:
    return {row: record for (_, row), record in run_steps(steps, budget_s).items()}


def test_a_step_sees_what_was_measured_before_it() -> None:
    found = _by_row([_step("a"), _step("b")])
    assert [record.result["after"] for record in found.values()] == [0, 1]
    assert all(record.status == "done" and 0 < record.result["left_s"] <= 100 for record in found.values())


def test_a_step_that_fails_is_recorded_and_the_others_go_on() -> None:
    found = _by_row([_step("a", ValueError("no such thing")), _step("b")])
    assert (found["a"].status, found["a"].words) == ("failed", "ValueError: no such thing")
    assert found["b"].status == "done"


def test_what_cannot_be_measured_here_is_skipped_with_the_reason() -> None:
    record = _by_row([_step("a", NotHereError("no device"))])["a"]
    assert (record.status, record.words, record.result) == ("skipped", "no device", {})


def test_time_is_kept_for_later_steps_that_matter_more() -> None:
    steps = [
        _step("less important", priority=1, estimate_s=60),
        _step("most important", priority=0, estimate_s=50),
        _step("as important", priority=1, estimate_s=60),
    ]
    found = _by_row(steps)
    assert {row: record.status for row, record in found.items()} == {
        "less important": "skipped",
        "most important": "done",
        "as important": "done",
    }
    assert found["less important"].words.startswith("no time: about 60 s")


def test_ctrl_c_gives_what_was_measured_until_then() -> None:
    found = _by_row([_step("a"), _step("b", KeyboardInterrupt()), _step("c")])
    assert [record.status for record in found.values()] == ["done", "failed", "skipped"]
    assert found["b"].words == found["c"].words == "interrupted"
