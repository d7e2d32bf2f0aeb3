"""What a conformance run found, in words: a table by family, then what needs a reader's eye, then the totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tests.conformance.case import DIFFERS, PASSED, SKIPPED, STOCK_FAILS, Result

STATUSES = (PASSED, DIFFERS, STOCK_FAILS, SKIPPED)
HEADER = (
    "family",
    "classes",
    "passed",
    "differ",
    "stock fails",
    "skipped",
    "fast",
    "handed over",
    "stock s",
    "other s",
)


def report(results: Sequence[Result], seconds: float) -> str:
    """The whole report of a run that took so many seconds."""
    ordered = sorted(results, key=lambda r: (r.family, r.class_name))
    return "\n".join([*_table(ordered), *_differing(ordered), *_reasons(ordered), *_totals(ordered, seconds)]) + "\n"


def _table(results: Sequence[Result]) -> Iterator[str]:
    families: dict[str, list[Result]] = {}
    for result in results:
        families.setdefault(result.family, []).append(result)
    rows = [HEADER, *(_row(family, members) for family, members in families.items()), _row("all", results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(row)))])


def _row(name: str, results: Sequence[Result]) -> tuple[str, ...]:
    statuses = Counter(result.status for result in results)
    return (
        name,
        str(len(results)),
        *(str(statuses[status]) for status in STATUSES),
        str(sum(result.fast for result in results)),
        str(sum(sum(result.handed_over.values()) for result in results)),
        f"{sum(result.stock_seconds for result in results):.2f}",
        f"{sum(result.other_seconds for result in results):.2f}",
    )


def _differing(results: Sequence[Result]) -> Iterator[str]:
    differing = [result for result in results if result.status == DIFFERS]
    if differing:
        yield "\nDiffering:"
    for result in differing:
        yield f"  {result.family}.{result.class_name}"
        for variant, lines in result.differences.items():
            yield f"    {variant}:"
            yield from ("      " + line.replace("\n", "\n        ") for line in lines)


def _reasons(results: Sequence[Result]) -> Iterator[str]:
    """Why classes were not compared; one line for all that share a reason."""
    for status in (STOCK_FAILS, SKIPPED):
        reasons: dict[str, list[str]] = {}
        for result in results:
            if result.status == status:
                reasons.setdefault(result.reason, []).append(result.class_name)
        if reasons:
            yield f"\n{status.capitalize()}:"
        for reason, names in sorted(reasons.items()):
            yield f"  {', '.join(names)}: {reason}"


def _totals(results: Sequence[Result], seconds: float) -> Iterator[str]:
    statuses = Counter(result.status for result in results)
    handed_over = sum((Counter(result.handed_over) for result in results), Counter[str]())
    n_fast, n_handed_over = sum(result.fast for result in results), handed_over.total()
    stock, other = sum(r.stock_seconds for r in results), sum(r.other_seconds for r in results)
    yield "\nTotals:"
    yield (
        f"  {len(results)} classes of {len({r.family for r in results})} families in {seconds:.0f} s: "
        + ", ".join(f"{statuses[status]} {status}" for status in STATUSES)
    )
    yield (
        f"  {sum(r.n_converters > 0 for r in results)} classes have tensors that are converted; "
        f"{sum(bool(r.lossy) for r in results)} do not come back from stock as they were built; "
        f"{sum(bool(r.mended) for r in results)} have computed tensors that only the other gives values; "
        f"{sum(bool(r.unsteady) for r in results)} have tensors that stock leaves unwritten"
    )
    yield f"  {n_fast} loads and saves by fastload, {n_handed_over} handed over ({_share(n_handed_over, n_fast)})"
    yield from (f"    {count} x {reason}" for reason, count in handed_over.most_common())
    share = _share(other, stock - other)
    yield f"  loads took {stock:.2f} s of the processor by stock and {other:.2f} s by the other ({share})"


def _share(part: float, rest: float) -> str:
    return f"{part / (part + rest):.1%}" if part + rest else "none"
