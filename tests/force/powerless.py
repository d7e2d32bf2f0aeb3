"""A program that works out every folder that a power failure during a save can leave, and loads each.

Run by test_power_failures.py as a process of its own, because it forks: ``python -m tests.force.powerless FOLDER``.

A save is traced once. What it made sure of (fsync) is on the disk; of what it did to the folder since it last made
sure of that, the disk has any part, in any order: POSIX promises no more, and not every file system does. A file that
was not made sure of is empty. This is how ALICE (Pillai et al., OSDI 2014) looks for faults in such protocols.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

from tests.force.killed import problems_of_the_next_save
from tests.force.saves import KINDS, generation_in, save
from tests.force.syscalls import CHANGES, Call, Fault, refusal, run_traced

# Of so many changes in doubt, every choice is tried; of more, those where few are on the disk, or few are not.
_ALL_CHOICES_OF = 5
_FEW = 2


class Change(NamedTuple):
    """A name that was given to a file or taken from it."""

    name: str
    file: int | None
    gone: str | None = None


class Step(NamedTuple):
    """A call of the save; of one that synchronises a file, its content then."""

    call: Call
    content: bytes | None


def steps_of(folder: str, kind: str) -> list[Step]:
    """The calls of a save into the folder that a power failure could fall between."""
    steps: list[Step] = []

    def note(_: int, call: Call) -> Fault | None:
        path = os.path.join(folder, call.paths[0])
        is_file = call.name in ("fsync", "fdatasync") and not os.path.isdir(path)
        content = None
        if is_file:
            with open(path, "rb") as file:
                content = file.read()
        steps.append(Step(call, content))
        return refusal(0) if call.name == "fsync" else None

    _, status = run_traced(lambda: save(folder, 2, kind, sync=True), folder, CHANGES, note)
    if status:
        raise RuntimeError(f"the save ended with {status}")
    return steps


def folders(old: dict[str, bytes], steps: list[Step]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every folder that can be found after a failure: (what was called last, content by name). Some more than once."""
    contents = list(old.values())
    durable = {name: number for number, name in enumerate(old)}
    current = dict(durable)
    doubtful: list[Change] = []
    for call, content in steps:
        paths = call.paths
        if call.name == "openat":
            contents.append(b"")
            current[paths[0]] = len(contents) - 1
            doubtful.append(Change(paths[0], current[paths[0]]))
        elif call.name == "rename":
            current[paths[1]] = current.pop(paths[0])
            doubtful.append(Change(paths[1], current[paths[1]], gone=paths[0]))
        elif call.name == "unlink":
            del current[paths[0]]
            doubtful.append(Change(paths[0], None))
        elif content is not None:
            contents[current[paths[0]]] = content
        elif call.name == "fsync":
            durable, doubtful = dict(current), []
        elif call.name not in ("mkdir", "writev", "write", "pwritev", "close"):
            raise RuntimeError(f"a call that this program does not know: {call}")
        for chosen in _choices(doubtful):
            names = dict(durable)
            for change in chosen:
                names.pop(change.gone or "", None)
                if change.file is None:
                    names.pop(change.name, None)
                else:
                    names[change.name] = change.file
            yield str(call), {name: contents[number] for name, number in names.items()}


def _choices(changes: list[Change]) -> Iterator[tuple[Change, ...]]:
    n = len(changes)
    for size in range(n + 1):
        if n <= _ALL_CHOICES_OF or size <= _FEW or n - size <= _FEW:
            yield from combinations(changes, size)
        else:
            yield tuple(changes[:size])


def fail_everywhere(folder: str, earlier: str, new: str) -> dict[str, Any]:
    """Load every folder that a power failure can leave of one save over another."""
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, 1, earlier)
    old = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            old[name] = file.read()
    tried: dict[frozenset[tuple[str, bytes]], int | str] = {}
    problems = []
    for last, files in folders(old, steps_of(folder, new)):
        # Temporary files that nothing names make no difference.
        state = frozenset(files.items())
        if state in tried:
            continue
        shutil.rmtree(folder)
        os.mkdir(folder)
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
        tried[state] = generation_in(folder)
        if tried[state] not in (1, 2):
            problems.append(f"{new} over {earlier}, after {last}: {tried[state]}; there are {sorted(files)}")
        elif len(tried) % 10 == 0:
            problems += problems_of_the_next_save(folder, len(tried), f"{new} over {earlier}, after {last}")
    found = list(tried.values())
    return {"folders": len(found), "old": found.count(1), "new": found.count(2), "problems": problems}


def main() -> None:
    folder = os.path.join(os.path.realpath(sys.argv[1]), "out")
    kinds = list(KINDS)
    pairs = [*zip(kinds, [*kinds[1:], kinds[0]], strict=True), ("3 safetensors", "3 safetensors")]
    results = {f"{new} over {earlier}": fail_everywhere(folder, earlier, new) for earlier, new in pairs}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
