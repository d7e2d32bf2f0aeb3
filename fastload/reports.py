"""What a load did, in numbers that can be printed, compared and kept."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LoadReport", "Stopwatch", "collapse_keys", "format_bytes"]


class Stopwatch:
    """Milliseconds by stage, in the order in which the stages began."""

    def __init__(self) -> None:
        self.stages_ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.stages_ms[stage] = self.stages_ms.get(stage, 0.0) + (time.perf_counter() - begin) * 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The account of one load.

    Attributes:
        source: the path or hub id that was asked for.
        files: the weight files, in the order they were opened.
        format: ``"safetensors"`` or ``"bin"``.
        n_tensors: tensors taken from the files.
        n_bytes: their bytes in the files.
        n_read_bytes: bytes of the files that this process asked for: mapped, or read with what is read over between two
            parts of them. Storage gives whole pages.
        bytes_by_action: source bytes by what was done with them (see `fastload.plan.rows.Action`).
        stages_ms: milliseconds by stage of the pipeline.
        private_bytes: growth of the process's anonymous memory over the load; None where it cannot be read.
            Pages of a mapped file are not in it: they belong to the page cache and are shared.
        missing_keys: names in the model that the files do not have.
        unexpected_keys: names in the files that the model does not have.
        mismatched_keys: (name, shape in the file, shape in the model).
        ignored_keys: names in the files that the model is known not to need.
        initialised_keys: names that were given fresh random values.
        notes: choices that were made, with the reason.
    """

    source: str
    files: tuple[str, ...]
    format: str
    n_tensors: int
    n_bytes: int
    n_read_bytes: int
    bytes_by_action: dict[str, int]
    stages_ms: dict[str, float]
    private_bytes: int | None = None
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    mismatched_keys: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    ignored_keys: tuple[str, ...] = ()
    initialised_keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """Wall time of all stages together."""
        return sum(self.stages_ms.values()) / 1e3

    @property
    def gb_per_s(self) -> float:
        """Source bytes over wall time, in decimal gigabytes a second. Mapped bytes count: they are usable."""
        return self.n_bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def mapped_share(self) -> float:
        """Share of the source bytes that are used where they lie, without a copy: 0 to 1."""
        n_mapped = self.bytes_by_action.get("map", 0) + self.bytes_by_action.get("remap", 0)
        return n_mapped / self.n_bytes if self.n_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the derived figures."""
        derived = {"seconds": self.seconds, "gb_per_s": self.gb_per_s, "mapped_share": self.mapped_share}
        return asdict(self) | derived

    def __str__(self) -> str:
        stages = "  ".join(f"{stage} {ms:.1f}" for stage, ms in self.stages_ms.items())
        actions = "  ".join(f"{action} {format_bytes(n)}" for action, n in self.bytes_by_action.items())
        private = "unknown" if self.private_bytes is None else format_bytes(self.private_bytes)
        lines = [
            f"loaded {self.source}",
            f"  files    {len(self.files)} ({self.format})",
            f"  tensors  {self.n_tensors}, {format_bytes(self.n_bytes)}{self._read_text()}",
            f"  time     {self.seconds * 1e3:.1f} ms ({stages}), {self.gb_per_s:.1f} GB/s",
            f"  bytes    {actions or 'none'}; {self.mapped_share:.0%} mapped without copying",
            f"  memory   {private} private",
        ]
        lines += self._key_lines()
        lines += [f"  note     {note}" for note in self.notes]
        return "\n".join(lines)

    def _read_text(self) -> str:
        return "" if self.n_read_bytes == self.n_bytes else f", {format_bytes(self.n_read_bytes)} asked of the files"

    def _key_lines(self) -> list[str]:
        groups = {
            "missing": self.missing_keys,
            "unexpected": self.unexpected_keys,
            "ignored": self.ignored_keys,
            "initialised": self.initialised_keys,
        }
        lines = [f"  {name:<8} {row}" for name, keys in groups.items() for row in collapse_keys(keys)]
        return lines + [
            f"  mismatch {key}: {list(in_file)} in the file, {list(in_model)} in the model"
            for key, in_file, in_model in self.mismatched_keys
        ]


def format_bytes(n_bytes: int) -> str:
    """A size for people, in decimal units: 438.0 MB."""
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def collapse_keys(keys: Iterable[str]) -> list[str]:
    """One row for keys that differ only in one number: ``layers.{0...11}.x``.

    Keys keep the order of their first member. A key with several numbers collapses over the one that varies.
    """
    rows = list(dict.fromkeys(keys))
    # From the last number to the first, so that the positions of those still to come stay what they are.
    for position in reversed(range(max((len(_NUMBER.findall(row)) for row in rows), default=0))):
        groups: dict[tuple[str, str], list[int]] = {}
        for row in rows:
            numbers = list(_NUMBER.finditer(row))
            if position < len(numbers):
                match = numbers[position]
                groups.setdefault((row[: match.start()], row[match.end() :]), []).append(int(match.group()))
            else:
                groups.setdefault((row, ""), [])
        rows = [f"{before}{_number_set(numbers)}{after}" for (before, after), numbers in groups.items()]
    return rows


def _number_set(numbers: list[int]) -> str:
    if not numbers:
        return ""
    numbers = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(numbers) == 1:
        return str(numbers[0])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}...{run[-1]}" for run in runs]
    return "{" + ", ".join(parts) + "}"
