"""Saves of several ranks, one of which is killed at every system call that changes the disk, one after the other.

A program of its own, because it forks: ``python -m tests.distributed.killed_ranks FOLDER``. It prints a JSON object
with an entry for each rank that was the one to be killed. What traces system calls is `tests.force.syscalls`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from fastload.saver import save_checkpoint
from tests.distributed.forked import fork_ranks, join_group, laid_out
from tests.force.saves import generation_in, save, tensors_of
from tests.force.syscalls import CHANGES, KILL, READS, Call, Fault, cut, refusal, run_traced

# Of so many ranks, this one is killed. Others than the first hear of each other through it.
GROUPS = {0: 2, 1: 3}
TIMEOUT_S = 20
_TWO_SHARDS_BYTES = 1700
_WRITTEN_AT_ONCE = 2000
# A process that dies before it closes a file closes it by dying. Opening for reading is a moment too: that is where a
# rank begins with its checksums.
_CALLS = {name: form for name, form in CHANGES.items() if name != "close"} | {"openat": READS["openat"]}


def save_by_all(folder: Path, rank: int, n_ranks: int) -> None:
    """One rank's side of a save of generation 2."""
    join_group(folder.parent, rank, n_ranks, TIMEOUT_S)
    save_checkpoint(
        laid_out(tensors_of(2)),
        folder,
        max_shard_size=_TWO_SHARDS_BYTES,
        extra_files={"config.json": json.dumps({"generation": 2})},
    )


def run(folder: Path, victim: int, count: int) -> tuple[list[Call], bool, list[str]]:
    """A save whose victim dies before its call of this number.

    Returns:
        The victim's calls, whether it was killed, and how the other ranks ended.
    """

    def decide(n_before: int, call: Call) -> Fault | None:
        if n_before == count:
            return KILL
        # A kill loses nothing that was written, so that syncing would only take time; and no write is whole.
        return refusal(0) if call.name == "fsync" else cut(_WRITTEN_AT_ONCE)

    def be_victim() -> None:
        calls, status = run_traced(lambda: save_by_all(folder, victim, n_ranks), str(folder), _CALLS, decide)
        (folder.parent / "calls").write_text(json.dumps([calls, status]))

    n_ranks = GROUPS[victim]
    actions = [be_victim if rank == victim else partial(save_by_all, folder, rank, n_ranks) for rank in range(n_ranks)]
    endings = fork_ranks(folder.parent, actions, 2 * TIMEOUT_S)
    calls, status = json.loads((folder.parent / "calls").read_text())
    del endings[victim]
    return [Call(*call) for call in calls], status == -signal.SIGKILL, endings


def kill_everywhere(folder: Path, victim: int) -> dict[str, Any]:
    """Kill a rank at its first call, then at its second, and so on until it comes to its end."""
    problems: list[str] = []
    found: list[int | str] = []
    endings: list[str] = []
    is_killed = True
    while is_killed:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folder.parent / "kept", folder)
        calls, is_killed, others = run(folder, victim, len(found))
        what = f"rank {victim} killed before {calls[-1]}" if is_killed else "nobody killed"
        found.append(generation_in(str(folder)))
        if found[-1] not in (1, 2):
            problems.append(f"{what}: {found[-1]}")
        if "done" in others and found[-1] != 2:
            problems.append(f"{what}: a rank says that it saved")
        expected = f"SaveError: the save was given up, because rank {victim} failed"
        wrong = [other for other in others if other != "done" and not other.startswith(expected)]
        problems += [f"{what}: another rank ended with {other}" for other in wrong]
        endings += others
        save(str(folder), 9, "2 bin")
        names = sorted(os.listdir(folder))
        if generation_in(str(folder)) != 9 or len(names) != 4:
            problems.append(f"{what}, then saved again: {names}")
    if found != sorted(found, key=str):
        problems.append(f"the new checkpoint was there, and then the old one again: {found}")
    return {
        "n_kills": len(found) - 1,
        "found": sorted({*map(str, found)}),
        "problems": problems,
        "error": max(endings, key=len),
    }


def main() -> None:
    folder = Path(os.path.realpath(sys.argv[1])) / "out"
    save(str(folder.parent / "kept"), 1, "safetensors")
    print(json.dumps({victim: kill_everywhere(folder, victim) for victim in GROUPS}))


if __name__ == "__main__":
    main()
