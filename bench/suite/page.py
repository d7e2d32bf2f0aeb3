"""The results that are kept, as a section of bench/README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from suite.outcome import Workload
from suite.table import render

__all__ = ["update_page"]

_BEGIN, _END = "<!-- results: written by compare.py --save -->", "<!-- end of results -->"


def update_page(page: Path, results: Path, workloads: Iterable[Workload]) -> None:
    """Write the tables of all kept results between the page's two marks, so that page and results agree."""
    before, begin, rest = page.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the marks between which results stand")
    tables = [
        f"```text\n{_where(document)}\n{render(document, workload.title)}\n```"
        for workload in workloads
        if (document := _kept(results / f"{workload.name}.json")) is not None
    ]
    page.write_text("\n\n".join([before + begin, *tables, end + after]))


def _kept(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def _where(document: dict[str, Any]) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}; "
        f"Python {machine['python']}\n{versions}; commit {machine['commit']}; load average {machine['load_average']}"
    )
