"""A document as a table for people."""

from __future__ import annotations

from typing import Any

__all__ = ["aligned", "promise", "render"]


def render(document: dict[str, Any], title: str) -> str:
    """The rows side by side, then each promise with its figure."""
    metric = document["metric"]
    others = list(dict.fromkeys(name for row in document["rows"].values() for name in row if name != metric))
    header = ["", f"{_name(metric)} min", "median", "x fastload", *(_name(other) for other in others)]
    body = [_cells(document, loader, others) for loader in document["rows"]]
    rounds = f"{document['rounds']} rounds"
    if document["disturbed_rounds"]:
        rounds += f", {document['disturbed_rounds']} of them while other processes ran"
    lines = [f"{document['workload']}: {title} ({rounds})", *aligned([header, *body])]
    if document["of_limit"] is not None:
        lines.append(f"  share of the limit: {document['of_limit']:.0%}")
    return "\n".join([*lines, *(promise(target) for target in document["targets"])])


def _cells(document: dict[str, Any], loader: str, others: list[str]) -> list[str]:
    metric, row = document["metric"], document["rows"][loader]
    ratio = document["ratios"].get(loader)
    cells = [loader]
    cells += [_value(metric, row[metric][part]) for part in ("min", "median")] if metric in row else ["-", "-"]
    cells.append(f"{ratio:.2f}" if ratio is not None else "")
    for other in others:
        found = row.get(other)
        value = found["median"] if isinstance(found, dict) else found
        cells.append("" if value is None else _value(other, value))
    return cells


def _name(metric: str) -> str:
    """A metric's name without its unit, which stands with the numbers."""
    if metric == "gb_per_s":
        return "rate"
    return metric.removesuffix("_s").removesuffix("_bytes").replace("_", " ")


def _value(metric: str, value: float) -> str:
    if metric.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    if metric == "gb_per_s":
        return f"{value:.1f} GB/s"
    if metric == "workers":
        return f"{value:.0f}"
    if metric.startswith("us_"):
        return f"{value:.2f} us"
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def promise(target: dict[str, Any]) -> str:
    """A target as a line: reached or missed, the figure, the bound."""
    word = "at most" if "at_most" in target else "at least"
    bound = target.get("at_most", target.get("at_least"))
    unit = target["unit"]
    verdict = "reached" if target["reached"] else "MISSED"
    figures = f"{target['of_medians']:.2f} {unit} (of minima {target['of_minima']:.2f})"
    return f"  {verdict}: {target['what']} {figures}, promised {word} {bound:g} {unit}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
