"""``fastload bench``: what it takes to load and run one's own checkpoint on this machine, beside transformers.

Each run is a process of its own. The libraries take turns, so that what changes in the machine changes for both, and
medians count. What the models put out is compared after the clock has stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import fastload
from fastload.cli.arguments import Where
from fastload.cli.measuring import Job, run_job
from fastload.cli.output import print_json, print_line, print_table, require_tables
from fastload.models.config_file import find_config_file, read_config_file
from fastload.progress import Progress
from fastload.reports import format_bytes
from fastload.sources.local import CheckpointFiles
from fastload.storage.residency import residency

__all__ = ["run"]

# The share of the largest number that outputs may differ by: kernels round differently, and bfloat16 has 8 bits.
_TOLERANCE = 0.02
# The share of a file that may stay in the page cache and it still counts as cold.
_MOST_RESIDENT = 0.01
_SECONDS = {
    "process start to first output": "at_output",
    "  import torch": "torch_s",
    "  import the library": "library_s",
    "  from_pretrained": "load_s",
    "  first forward": "forward_s",
    "a second forward": "second_forward_s",
}
_BYTES = {"private memory": "private_bytes", "peak memory": "peak_bytes", "read from disk": "read_bytes"}


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. 1 if the two models' outputs differ."""
    if not arguments.json:
        require_tables()
    where = Where.of(arguments)
    config = find_config_file(where.path, subfolder=where.files.subfolder, hub=where.hub)
    values = read_config_file(config)
    files = where.locate()
    jobs = [
        Job(
            library=library,
            auto_class=_auto_class(values),
            folder=files.folder,
            load_options=_load_options(arguments),
            tokens=_tokens(values, arguments.tokens),
        )
        for library in ("fastload", "transformers")
        if importlib.util.find_spec(library)
    ]
    found, notes = _measure(jobs, files, arguments.rounds, arguments.cold)
    differences = _differences(found)
    if arguments.json:
        print_json(_document(where.path, files, found, notes, differences))
    else:
        _print(where.path, files, found, notes, differences)
    return 0 if differences is None or differences[0] <= _TOLERANCE * differences[1] else 1


def _auto_class(values: Mapping[str, Any]) -> str:
    """The Auto class for what the config names: BertForMaskedLM is loaded by AutoModelForMaskedLM."""
    named = values.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    task = re.search(r"For[A-Z]\w*$", name.replace("LMHeadModel", "ForCausalLM"))
    auto_class = f"AutoModel{task[0]}" if task else "AutoModel"
    return auto_class if auto_class in fastload.__all__ else "AutoModel"


def _load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    asked = {"variant": arguments.variant, "use_safetensors": arguments.use_safetensors}
    asked["dtype"] = "auto" if arguments.dtype is None else arguments.dtype.torch_name
    return {name: value for name, value in asked.items() if value is not None}


def _tokens(values: Mapping[str, Any], count: int) -> tuple[int, ...]:
    size = values.get("vocab_size")
    n_known = size if isinstance(size, int) and size > 1 else 2
    return tuple(1 + number % (n_known - 1) for number in range(count))


def _measure(
    jobs: Sequence[Job], files: CheckpointFiles, n_rounds: int, cold: bool
) -> tuple[dict[tuple[str, str], list[dict[str, Any]]], list[str]]:
    """(``"warm"`` or ``"cold"``, library) -> its runs; and what to know about them."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    notes = ["transformers is not installed"] if len(jobs) == 1 else []
    n_bytes = sum(map(os.path.getsize, files.weights))
    n_runs = len(jobs) * (1 + n_rounds * (1 + cold))
    with Progress("measuring", n_runs * n_bytes) as progress:
        for job in jobs:
            # Brings the files and the libraries' code into the page cache, and does not count.
            run_job(job)
            progress.advance(n_bytes)
        for state in ("warm", "cold") if cold else ("warm",):
            for _ in range(n_rounds):
                for job in jobs:
                    if state == "cold" and not _drop(files.weights):
                        notes.append(
                            "cold files were not measured: these stay in memory, by their file system or in use"
                        )
                        return {kind: runs for kind, runs in found.items() if kind[0] == "warm"}, notes
                    found.setdefault((state, job.library), []).append(_with_spans(run_job(job)))
                    progress.advance(n_bytes)
    return found, notes


def _drop(paths: Sequence[str]) -> bool:
    """Drop the files' pages from the page cache; whether they went."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only what is on the disk can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            left = residency(descriptor)
        finally:
            os.close(descriptor)
        if left.n_resident_bytes is None or left.n_resident_bytes > _MOST_RESIDENT * left.n_bytes:
            return False
    return True


def _with_spans(result: dict[str, Any]) -> dict[str, Any]:
    """A run with the time from each moment to the next."""
    moments = ("at_torch", "at_library", "at_model", "at_output", "at_second_output")
    times = [0.0, *(result[moment] for moment in moments)]
    spans = (later - earlier for earlier, later in pairwise(times))
    names = ("torch_s", "library_s", "load_s", "forward_s", "second_forward_s")
    return {**result, **dict(zip(names, spans, strict=True))}


def _median(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [run[name] for run in runs if run[name] is not None]
    return median(values) if values else None


def _differences(found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> tuple[float, float] | None:
    """The largest difference of the two models' outputs, and their largest number; None for one library alone."""
    outputs = {library: runs[-1]["output"] for (_, library), runs in found.items()}
    if len(outputs) < 2:
        return None
    ours, theirs = outputs.values()
    if len(ours) != len(theirs):
        return float("inf"), 1.0
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), max(map(abs, theirs))


def _document(
    source: str,
    files: CheckpointFiles,
    found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    notes: Sequence[str],
    differences: tuple[float, float] | None,
) -> dict[str, Any]:
    names = [*_SECONDS.values(), *_BYTES.values()]
    return {
        "source": source,
        "target": _class_of(found),
        "n_bytes": sum(map(os.path.getsize, files.weights)),
        "rows": [
            {
                "state": state,
                "library": library,
                "version": runs[0]["version"],
                "medians": {name: _median(runs, name) for name in names} | {"stages_ms": _stages(runs)},
                "rounds": [{name: run[name] for name in names} for run in runs],
            }
            for (state, library), runs in found.items()
        ],
        "largest_difference": None if differences is None else differences[0],
        "largest_output": None if differences is None else differences[1],
        "notes": list(notes),
    }


def _stages(runs: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    stages = [run["stages_ms"] for run in runs if run["stages_ms"]]
    return {name: median(run[name] for run in stages) for name in stages[0]} if stages else None


def _class_of(found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> str:
    return str(next(iter(found.values()))[0]["class"])


def _print(
    source: str,
    files: CheckpointFiles,
    found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    notes: Sequence[str],
    differences: tuple[float, float] | None,
) -> None:
    n_bytes = sum(map(os.path.getsize, files.weights))
    n_runs = len(next(iter(found.values())))
    print_line(f"{source}: {_class_of(found)}, {format_bytes(n_bytes)}; medians of {n_runs} fresh processes\n")
    libraries = list(dict.fromkeys(library for _, library in found))
    columns = ("", *libraries, *(("ratio",) if len(libraries) > 1 else ()))
    rows: list[tuple[str, ...]] = []
    for state in dict.fromkeys(state for state, _ in found):
        rows += [(f"{state} files",), *_rows({library: found[state, library] for library in libraries})]
    print_table(columns, rows, right=columns[1:])
    print_line()
    if differences is not None:
        print_line(f"outputs differ by at most {differences[0]:.2g}, in numbers of up to {differences[1]:.2g}")
    for note in notes:
        print_line(f"note: {note}")


def _rows(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, ...]]:
    for title, name in _SECONDS.items():
        values = [_median(of_one, name) for of_one in runs.values()]
        yield title, *(_seconds(value) for value in values), *_ratio(values)
        if name == "load_s":
            for stage, ms in (_stages(runs["fastload"]) or {}).items():
                yield f"    {stage}", _seconds(ms / 1e3), *("" for _ in values[1:]), *("" for _ in _ratio(values))
    for title, name in _BYTES.items():
        values = [_median(of_one, name) for of_one in runs.values()]
        shown = ("" if value is None else format_bytes(int(value)) for value in values)
        yield title, *shown, *_ratio(values)


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _ratio(values: Sequence[float | None]) -> tuple[str, ...]:
    """The second over the first; no cell where there is but one."""
    if len(values) < 2:
        return ()
    first, second = values
    return (f"{second / first:.1f} x" if first and second else "",)
