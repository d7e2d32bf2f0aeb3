"""Documents as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["MissingMatplotlibError", "plot"]


class MissingMatplotlibError(ImportError):
    """The picture needs a package that is not installed."""


def plot(documents: Sequence[dict[str, Any]], file: Path) -> None:
    """One panel a workload: a bar for each loader's median, with the samples as dots."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingMatplotlibError("--plot needs matplotlib: pip install matplotlib") from None
    n_rows = [sum(document["metric"] in row for row in document["rows"].values()) for document in documents]
    figure = Figure(figsize=(9, sum(0.34 * n + 0.9 for n in n_rows)), layout="constrained")
    panels = figure.subplots(len(documents), 1, squeeze=False, height_ratios=[n + 1.5 for n in n_rows])[:, 0]
    for panel, document in zip(panels, documents, strict=True):
        _draw(panel, document)
    figure.savefig(file, dpi=130)


def _draw(panel: Any, document: dict[str, Any]) -> None:
    metric = document["metric"]
    rows = {loader: row[metric] for loader, row in document["rows"].items() if metric in row}
    scale, unit = (1e6, "MB") if metric.endswith("_bytes") else (1, "s")
    for position, (loader, found) in enumerate(rows.items()):
        colour = "tab:blue" if "fastload" in loader else "tab:grey"
        if document["limit"] is not None and found["median"] == float(f"{document['limit']:.5g}"):
            colour = "tab:green"
        panel.barh(position, found["median"] / scale, color=colour, alpha=0.75)
        panel.plot([value / scale for value in found["samples"]], [position] * len(found["samples"]), "k.", ms=3)
        ratio = document["ratios"].get(loader)
        label = f" {found['median'] / scale:.3g} {unit}" + (f", {ratio:.1f} x" if ratio else "")
        panel.text(max(found["samples"]) / scale, position, label, va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), rows, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.22)
    panel.set_xlim(left=0)
    panel.set_title(f"{document['workload']} ({unit}, median and samples)", fontsize=9, loc="left")
