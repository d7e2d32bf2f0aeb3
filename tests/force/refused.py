"""A program whose saves meet an error of the system at every call, one after the other.

Run by test_refusals.py as a process of its own, because it forks: ``python -m tests.force.refused FOLDER``. It prints a
JSON list with an entry for each kind of fault.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from typing import Any

from fastload.errors import SaveError
from tests.force.killed import problems_of_the_next_save
from tests.force.saves import generation_in, save
from tests.force.syscalls import CHANGES, READS, Call, Fault, refusal, run_traced

_OLD, _NEW = 3, 4
Saves = tuple[tuple[str, str], ...]
_TO_BIN: Saves = (("2 bin", "safetensors"),)
_TO_SAFETENSORS: Saves = (("3 safetensors", "2 bin"),)
_SINGLE: Saves = (("safetensors", "3 safetensors"), ("bin", "2 bin"))
# What a full disk refuses; what makes room goes on.
_TAKES_ROOM = {"write", "writev", "pwritev", "pwrite64", "openat", "open", "mkdir", "fsync", "ftruncate", "fallocate"}
_EVERYTHING = CHANGES | {name: form for name, form in READS.items() if name != "lseek"}


def once(number: int) -> Callable[[int], Callable[[int, Call], Fault | None]]:
    """One call fails."""
    return lambda count: lambda n_before, call: refusal(number) if n_before == count else _otherwise(call)


def once_without_renames(number: int) -> Callable[[int], Callable[[int, Call], Fault | None]]:
    """One call fails, where renames are refused, so that files are copied to their places."""

    def at(count: int) -> Callable[[int, Call], Fault | None]:
        fails = once(number)(count)
        return lambda n_before, call: refusal(errno.EPERM) if call.name == "rename" else fails(n_before, call)

    return at


def from_then_on(number: int, names: set[str]) -> Callable[[int], Callable[[int, Call], Fault | None]]:
    """A call fails, and so does each after it that is one of these."""

    def at(count: int) -> Callable[[int, Call], Fault | None]:
        return lambda n_before, call: refusal(number) if n_before >= count and call.name in names else _otherwise(call)

    return at


def _otherwise(call: Call) -> Fault | None:
    return refusal(0) if call.name == "fsync" else None


def refuse_everywhere(
    folder: str, saves: Saves, faults: Callable[[int], Callable[[int, Call], Fault | None]], *, everything: bool = False
) -> dict[str, Any]:
    """Saves that meet a fault at the first call, at the second, and so on; of every kind, over another one.

    Args:
        folder: where to.
        saves: the kinds of the saves, and of the checkpoints before them.
        faults: number of a call -> what becomes of the calls if the fault begins there.
        everything: take the calls that read into account too, which a save makes as well.
    """
    n_faults, problems = 0, []
    outcomes = {"saved": 0, "refused, old": 0, "refused, new": 0}
    for new, earlier in saves:
        kept, count = f"{folder}-{earlier}", 0
        if not os.path.exists(kept):
            save(kept, 1, earlier)
        while True:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(kept, folder)
            calls, status = run_traced(
                lambda new=new: _save(folder, new), folder, _EVERYTHING if everything else CHANGES, faults(count)
            )
            if count >= len(calls):
                break
            expected = {0: ("saved", 2), _OLD: ("refused, old", 1), _NEW: ("refused, new", 2)}.get(status)
            found = generation_in(folder)
            if expected is None or found != expected[1]:
                problems.append(f"{new} over {earlier}, {calls[count]}: ended with {status}, and holds {found}")
            else:
                outcomes[expected[0]] += 1
            problems += problems_of_the_next_save(folder, count, f"{new} over {earlier}, {calls[count]}")
            n_faults += 1
            count += 1
    return {"faults": n_faults, **outcomes, "problems": problems}


def _save(folder: str, kind: str) -> None:
    """Save, and end with a status that says what the error said."""
    try:
        save(folder, 2, kind, sync=True)
    except SaveError as error:
        if str(error.file).startswith(folder) and error.fix:
            os._exit(_NEW if "is complete" in error.problem else _OLD)
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        raise


def main() -> None:
    folder = os.path.join(os.path.realpath(sys.argv[1]), "out")
    refused = refuse_everywhere
    numbers = (
        (errno.ENOSPC, _TO_SAFETENSORS),
        (errno.EIO, _SINGLE),
        (errno.EDQUOT, _TO_BIN),
        (errno.EACCES, _TO_SAFETENSORS),
    )
    results = {f"{errno.errorcode[n]}, once": refused(folder, saves, once(n)) for n, saves in numbers}
    results["ENOSPC, from then on"] = refused(folder, _TO_BIN, from_then_on(errno.ENOSPC, _TAKES_ROOM))
    results["EDQUOT, from then on"] = refused(folder, _TO_SAFETENSORS, from_then_on(errno.EDQUOT, _TAKES_ROOM))
    results["EIO, of every change from then on"] = refused(folder, _SINGLE, from_then_on(errno.EIO, set(CHANGES)))
    results["EIO, reading included, once"] = refused(folder, _TO_SAFETENSORS, once(errno.EIO), everything=True)
    results["ENOSPC, once, where renames are refused"] = refused(
        folder, (("2 bin", "safetensors"), ("safetensors", "safetensors")), once_without_renames(errno.ENOSPC)
    )
    results["EINTR, once"] = refused(folder, _TO_BIN, once(errno.EINTR))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
