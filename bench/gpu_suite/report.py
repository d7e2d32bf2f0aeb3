"""What was found, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median
from typing import Any

from suite.table import aligned, promise

from gpu_suite.plan import HARDWARE, MAKE, TESTS
from gpu_suite.schedule import Record, Records
from gpu_suite.verdicts import checked_contents, differences, targets

__all__ = ["as_json", "document", "render"]

_MOST_WORDS = 300
_Columns = dict[str, Callable[[dict[str, Any]], str]]


def document(records: Records, about: dict[str, Any], options: dict[str, Any], spent_s: float) -> dict[str, Any]:
    """All of it as plain data. ``is_whole`` is false where a step failed, or two loaders disagree."""
    kept, missing = targets(records)
    unequal = differences(records)
    return {
        "benchmark": "gpu",
        "is_whole": not unequal and all(record.status != "failed" for record in records.values()),
        **about,
        "options": options,
        "spent_s": round(spent_s, 1),
        "steps": [_step(record) for record in records.values()],
        "targets": [target.to_dict() for target in kept],
        "not_measured": missing,
        "compared": checked_contents(records),
        "differences": unequal,
    }


def as_json(found: dict[str, Any]) -> str:
    """One JSON object, a line for each step and each target."""
    lines = []
    for name, value in found.items():
        if isinstance(value, list) and value:
            items = ",\n  ".join(json.dumps(_short(item)) for item in value)
            lines.append(f"{json.dumps(name)}: [\n  {items}\n ]")
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(_short(value))}")
    return "{\n " + ",\n ".join(lines) + "\n}"


def render(records: Records, found: dict[str, Any]) -> str:
    """The tables, then each promise with its figure, then what was not done."""
    lines = [_head(found), *_hardware(records)]
    groups = dict.fromkeys(group for group, _ in records if group not in (MAKE, HARDWARE, TESTS, "repeated loads"))
    for group in groups:
        rows = {row: record for (of, row), record in records.items() if of == group and record.status == "done"}
        if rows:
            lines += ["", f"{group}{_of_what(rows)}", *_table(rows)]
    lines += ["", *_rest(records), *(promise(target) for target in found["targets"])]
    lines += [f"  not measured: {what} ({why})" for what, why in found["not_measured"].items()]
    compared = ", ".join(f"{content} {n}" for content, n in found["compared"].items())
    lines.append(f"  bytes compared, results by content: {compared or 'none'}")
    lines += [f"  DIFFERENT BYTES: {line}" for line in found["differences"]]
    not_done: dict[str, list[str]] = {}
    for record in records.values():
        if record.status != "done":
            not_done.setdefault(f"{record.status}: {record.row}: {record.words[:_MOST_WORDS]}", []).append(record.group)
    lines += [f"  {what} ({', '.join(where)})" for what, where in not_done.items()]
    return "\n".join(lines)


def _head(found: dict[str, Any]) -> str:
    machine, accelerator = found["machine"], found["accelerator"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    small = "\n--small: these figures say nothing about speed" if found["options"]["small"] else ""
    return (
        f"{accelerator['device']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['system']}; Python {machine['python']}\n{versions}; commit {machine['commit']}; "
        f"{found['spent_s']:.0f} s{small}"
    )


def _hardware(records: Records) -> list[str]:
    lines = []
    if link := _result(records, "link"):
        what = "memory to memory (no device here)" if link["is_host_copy"] else "host to device"
        pinning = f", pinning {link['pin_s_per_gb']:.2f} s/GB" if "pin_s_per_gb" in link else ""
        lines.append(
            f"{what}: pinned {link['pinned_gb_per_s']:.1f}, pageable {link['pageable_gb_per_s']:.1f} GB/s{pinning}"
        )
    for name, where in (("page cache", "page cache into"), ("storage", "storage,")):
        rates = _result(records, name)
        for kind in [kind for kind in rates if isinstance(rates[kind], dict) and rates[kind]]:
            by_threads = ", ".join(f"{rate:.1f} x {n}" for n, rate in rates[kind].items())
            lines.append(f"{where} {kind.removesuffix('_gb_per_s')}, GB/s x threads: {by_threads}")
    if storage := _result(records, "storage"):
        lines.append(f"storage at its best ({storage['best']}): {storage['best_gb_per_s']:.2f} GB/s")
    return lines


def _result(records: Records, row: str) -> dict[str, Any]:
    record = records.get((HARDWARE, row))
    return record.result if record is not None else {}


def _of_what(rows: dict[str, Record]) -> str:
    result = next(iter(rows.values())).result
    return f" ({result['content']}, {result['n_bytes'] / 1e9:.2f} GB)"


def _table(rows: dict[str, Record]) -> list[str]:
    ours = rows["fastload"].result if "fastload" in rows else None
    columns = _FORWARDS if "forward_s" in next(iter(rows.values())).result else _LOADS
    body = []
    for row, record in rows.items():
        ratio = (
            f"{median(record.result['seconds']) / median(ours['seconds']):.2f}" if ours and row != "fastload" else ""
        )
        body.append([row, ratio, *(cell(record.result) for cell in columns.values())])
    return aligned([["", "x fastload", *columns], *body])


def _rest(records: Records) -> list[str]:
    lines = []
    repeated = records.get(("repeated loads", "fastload"))
    if repeated is not None and repeated.result:
        found = repeated.result
        lines.append(
            f"  {found['times']} loads of {found['checkpoint']}: host {found['host_growth_bytes'] / 1e6:+.1f} MB, "
            f"device {found['device_growth_bytes'] / 1e6:+.1f} MB, threads {found['thread_growth']:+}, open files "
            f"{found['file_growth']:+}; median {_seconds(median(found['seconds']))}; "
            f"given back at the end {found['freed_bytes'] / 1e6:.1f} MB"
        )
    tests = records.get((TESTS, "pytest -m gpu"))
    if tests is not None and tests.result:
        lines.append(f"  pytest -m gpu: {tests.result['summary']}")
    return lines


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _median_s(metric: str) -> Callable[[dict[str, Any]], str]:
    return lambda result: _seconds(median(result[metric])) if metric in result else ""


def _megabytes(metric: str) -> Callable[[dict[str, Any]], str]:
    return lambda result: f"{result[metric] / 1e6:.0f} MB"


def _rate(result: dict[str, Any]) -> str:
    return f"{result['n_bytes'] / median(result['seconds']) / 1e9:.2f} GB/s"


_LOADS: _Columns = {
    "first": lambda result: _seconds(result["first_s"]),
    "later": _median_s("seconds"),
    "rate": _rate,
    "host peak": _megabytes("host_peak_bytes"),
    "device peak": _megabytes("device_peak_bytes"),
    "cached": lambda result: f"{result['cached_share']:.0%}",
    "version": lambda result: result["version"] or "",
}
_FORWARDS: _Columns = {
    "load": _median_s("load_s"),
    "forward": _median_s("forward_s"),
    "one, then the other": _median_s("seconds"),
    "streamed": _median_s("stream_s"),
    "model returned": _median_s("return_s"),
}


def _step(record: Record) -> dict[str, Any]:
    step: dict[str, Any] = {"group": record.group, "row": record.row, "status": record.status, "s": record.seconds}
    if record.words:
        step["words"] = record.words
    return step | record.result


def _short(value: Any) -> Any:
    """Numbers to five digits, and digests cut: more would be noise. Whole numbers stay as they are."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, dict):
        return {name: item[:16] if name == "digest" else _short(item) for name, item in value.items()}
    return value
