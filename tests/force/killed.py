"""A program whose saves are killed at every system call that changes the disk, one after the other.

Run by test_kills.py as a process of its own, because it forks: ``python -m tests.force.killed FOLDER``. It prints a
JSON list with an entry for each combination of an earlier and a new checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.force.saves import KINDS, NOTHING, generation_in, save
from tests.force.syscalls import CHANGES, KILL, Call, Fault, cut, refusal, run_traced

# A write of a shard is made several: a process can die with any part of a file written.
_WRITTEN_AT_ONCE = 1_500
# The next save after a kill, of each kind in turn, and the number of files it leaves.
_NEXT = dict(zip(KINDS, (2, 5, 2, 4), strict=True))
# A process that dies before it closes a file closes it by dying.
_CALLS = {name: form for name, form in CHANGES.items() if name != "close"}


def combinations() -> Iterator[tuple[str | None, str]]:
    """Every kind of checkpoint over one of its own kind, over the next two kinds, and the first over nothing."""
    yield None, "safetensors"
    kinds = list(KINDS)
    for number, new in enumerate(kinds):
        for step in range(3):
            yield kinds[(number + step) % len(kinds)], new


def killed_at(count: int, *, renames: bool = True) -> Callable[[int, Call], Fault | None]:
    """Decides that the process dies before its call of this number; without renames, those are refused."""

    def decide(n_before: int, call: Call) -> Fault | None:
        if n_before == count:
            return KILL
        if call.name == "rename" and not renames:
            return refusal(errno.EPERM)
        # A kill, unlike a power failure, loses nothing that was written: syncing would only take time.
        return refusal(0) if call.name == "fsync" else cut(_WRITTEN_AT_ONCE)

    return decide


def problems_of_the_next_save(folder: str, number: int, what: str) -> list[str]:
    """Save once more: what is wrong with the folder then. It holds that save, and nothing that others left."""
    kind, n_files = list(_NEXT.items())[number % len(_NEXT)]
    save(folder, 9, kind)
    after, names = generation_in(folder), sorted(os.listdir(folder))
    return [] if after == 9 and len(names) == n_files else [f"{what}, then saved again: {after}, {names}"]


def kill_everywhere(
    folder: str, prepare: Callable[[], object], new: str, generation: int, earlier: int, *, renames: bool = True
) -> dict[str, Any]:
    """Kill a save at its first call, then at its second, and so on until one comes to its end.

    Args:
        folder: where it saves to.
        prepare: makes the folder what the save finds.
        new: the kind of the save.
        generation: what it saves.
        earlier: the generation before.
        renames: whether the file system has any.
    """
    names: Counter[str] = Counter()
    problems: list[str] = []
    found: list[int | str] = []
    status = -signal.SIGKILL
    while status == -signal.SIGKILL:
        shutil.rmtree(folder, ignore_errors=True)
        prepare()
        calls, status = run_traced(
            lambda: save(folder, generation, new, sync=True), folder, _CALLS, killed_at(len(found), renames=renames)
        )
        if status == -signal.SIGKILL:
            names[calls[-1].name] += 1
        found.append(generation_in(folder))
        if found[-1] not in (earlier, generation):
            problems.append(f"killed before {calls[-1]}: {found[-1]}")
        problems += problems_of_the_next_save(folder, len(found), f"killed before {calls[-1]}")
    if status != 0:
        problems.append(f"the save ended with {status}")
    if found != sorted(found, key=lambda one: one == generation):
        problems.append("the new checkpoint was there, and then the old one again")
    return {"kills": len(found) - 1, "calls": names, "problems": problems, "both": len(set(found)) == 2}


def main() -> None:
    folder = os.path.join(os.path.realpath(sys.argv[1]), "out")
    results = []
    for earlier, new in combinations():
        kept = f"{folder}-{earlier}"
        if earlier is not None and not os.path.exists(kept):
            save(kept, 1, earlier)

        def prepare(earlier: str | None = earlier, kept: str = kept) -> None:
            if earlier is not None:
                shutil.copytree(kept, folder)

        done = kill_everywhere(folder, prepare, new, 2, NOTHING if earlier is None else 1)
        results.append({"what": f"{new} over {earlier or 'nothing'}", **done})
    for new, earlier in (("2 bin", "safetensors"), ("safetensors", "safetensors")):
        what = f"{new} over {earlier}, where renames are refused"
        kept = f"{folder}-{earlier}"
        prepare = partial(shutil.copytree, kept, folder)
        results.append({"what": what, **kill_everywhere(folder, prepare, new, 2, 1, renames=False)})
    results.append({"what": "a save that finishes a killed one", **_kill_what_recovers(folder)})
    json.dump(results, sys.stdout)


def _kill_what_recovers(folder: str) -> dict[str, Any]:
    """The same, of a save that finds one that was killed among its renames."""
    kept = f"{folder}-half"
    save(kept, 1, "bin")
    n_renames = 0

    def decide(_: int, call: Call) -> Fault | None:
        nonlocal n_renames
        n_renames += call.name == "rename"
        return KILL if n_renames == 3 else None  # the journal, one shard, and the next

    run_traced(lambda: save(kept, 2, "3 safetensors"), kept, _CALLS, decide)
    return kill_everywhere(folder, lambda: shutil.copytree(kept, folder) and None, "2 bin", 3, 2)


if __name__ == "__main__":
    main()
