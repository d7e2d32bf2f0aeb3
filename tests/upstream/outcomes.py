"""The outcomes of two runs of the same tests, compared test by test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["ABSENT", "Difference", "Outcome", "Test", "compare", "read_outcomes", "table"]

Test = tuple[str, str]
"""(dotted name of the class or module, name of the test)"""

# From best to worst.
_KINDS = ("passed", "xfailed", "skipped", "failed", "error", "absent")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One of `passed`, `xfailed`, `skipped`, `failed`, `error`, `absent`, and the first line that the test said."""

    kind: str
    said: str = ""

    @property
    def rank(self) -> int:
        return _KINDS.index(self.kind)


ABSENT = Outcome("absent")


@dataclass(frozen=True, slots=True)
class Difference:
    """A test that came out otherwise in the second run."""

    test: Test
    first: Outcome
    second: Outcome

    @property
    def worse(self) -> bool:
        return self.second.rank > self.first.rank

    def __str__(self) -> str:
        where = "::".join((self.test[0].rpartition(".")[2], self.test[1]))
        said = self.second.said or self.first.said
        return f"{where}: {self.first.kind} -> {self.second.kind}" + (f"  ({said})" if said else "")


def read_outcomes(junit: Path) -> dict[Test, Outcome]:
    """What a run's junit file has of each test. Where subtests of one test are told apart, the worst counts."""
    outcomes: dict[Test, Outcome] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        test = (case.get("classname", ""), case.get("name", ""))
        outcome = max((_outcome(child) for child in case), key=lambda o: o.rank, default=Outcome("passed"))
        outcomes[test] = max(outcomes.get(test, outcome), outcome, key=lambda o: o.rank)
    return outcomes


def _outcome(child: ElementTree.Element) -> Outcome:
    kind = {"failure": "failed", "error": "error", "skipped": "skipped"}.get(child.tag, "passed")
    if child.get("type") == "pytest.xfail":
        kind = "xfailed"
    return Outcome(kind, (child.get("message") or "").partition("\n")[0][:200])


def compare(first: Mapping[Test, Outcome], second: Mapping[Test, Outcome]) -> list[Difference]:
    """The tests whose outcomes differ, the worse ones first; a test that one run lacks is absent there."""
    pairs = [(test, first.get(test, ABSENT), second.get(test, ABSENT)) for test in sorted({*first, *second})]
    differences = [Difference(test, a, b) for test, a, b in pairs if a.kind != b.kind]
    return sorted(differences, key=lambda difference: not difference.worse)


def table(first: Mapping[Test, Outcome], differences: Iterable[Difference]) -> str:
    """A line for each class: how many tests ran, were skipped, came out the same and otherwise; then the sum."""
    differing = [difference.test for difference in differences]
    classes = sorted({classname for classname, _ in [*first, *differing]})
    rows = [("model", "tests", "skipped", "same", "differ")]
    rows += [_row(name, first, differing, [name]) for name in classes]
    rows += [_row("all", first, differing, classes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(_aligned, range(len(row)), row, widths)) for row in rows)


def _aligned(column: int, cell: str, width: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def _row(title: str, first: Mapping[Test, Outcome], differing: Iterable[Test], classes: list[str]) -> tuple[str, ...]:
    n_differ = sum(test[0] in classes for test in differing)
    kinds = [outcome.kind for test, outcome in first.items() if test[0] in classes]
    n_same = len(kinds) - sum(test[0] in classes and test in first for test in differing)
    name = title.rpartition(".")[2].removeprefix("Test_")
    return name, str(len(kinds)), str(kinds.count("skipped")), str(n_same), str(n_differ)
