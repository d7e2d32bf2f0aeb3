"""A program that saves to file systems that are full, have no room for another file, or are read-only.

Run by test_saves_by_force.py as a process of its own, because it mounts: ``python -m tests.force.full FOLDER``. The
mount is a small tmpfs in a namespace of this process: nobody else sees it, and it goes with the process. It prints a
JSON object; its only entry is the reason where no mount is permitted.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from typing import Any

from fastload.errors import SaveError
from tests.force.saves import KINDS, generation_in, save

_NEW_MOUNTS, _NEW_USERS = 0x20000, 0x10000000
_READ_ONLY, _REMOUNT, _PRIVATE = 1, 32, 0x4000 | 1 << 18
_PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)


def _call(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)


def mount(folder: str, options: str, flags: int = 0) -> None:
    """A tmpfs at a folder."""
    _call(_libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(flags), options.encode()), "mount")


def enter_namespace() -> None:
    """Have mounts be this process's own; as a user of its own, where it may not do so otherwise."""
    user = os.getuid()
    if _libc.unshare(_NEW_MOUNTS):
        _call(_libc.unshare(_NEW_MOUNTS | _NEW_USERS), "unshare")
        with open("/proc/self/uid_map", "w") as file:
            file.write(f"0 {user} 1")
    _call(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None), "mount")


def fill_up(folder: str, new: str, earlier: str) -> dict[str, Any]:
    """Save with no page free, then with one, and so on until there is room for it."""
    told, n_pages, problems = 0, 0, []
    ballast = os.path.join(folder, "ballast")
    while True:
        save(folder, 1, earlier)
        status = os.statvfs(folder)
        with open(ballast, "wb") as file:
            file.write(bytes((status.f_bavail - n_pages) * _PAGE))
        problem = _refusal(folder, new, "No space left")
        found = generation_in(folder)
        left = [name for name in os.listdir(folder) if name.startswith(".")]
        os.unlink(ballast)
        if problem is None:
            return {"told": told, "problems": problems + ([] if found == 2 else [f"saved, and holds {found}"])}
        if problem or found != 1 or left:
            problems.append(f"{new} over {earlier}, {n_pages} pages free: {problem}; holds {found}; left {left}")
        told += 1
        n_pages += 1


def _refusal(folder: str, kind: str, expected: str) -> str | None:
    """None if it was saved, "" if it was refused for the reason that was expected, else what was said."""
    try:
        save(folder, 2, kind, sync=True)
    except SaveError as error:
        return "" if re.search(expected, error.problem) and error.fix and error.file else str(error)
    return None


def refuse(folder: str, options: str, flags: int, expected: str) -> dict[str, Any]:
    """Save to a file system that refuses anything new."""
    mount(folder, "size=1m")
    save(folder, 1, "2 bin")
    mount(folder, options, flags | _REMOUNT)
    problem, found = _refusal(folder, "3 safetensors", expected), generation_in(folder)
    return {"told": 1, "problems": [] if problem == "" and found == 1 else [f"{problem}; holds {found}"]}


def main() -> None:
    folder = os.path.realpath(sys.argv[1])
    try:
        enter_namespace()
        mount(folder, "size=256k")
    except OSError as error:
        json.dump({"refused": f"no tmpfs can be mounted here: {error.filename or ''}{error}"}, sys.stdout)
        return
    kinds = list(KINDS)
    results = {
        f"a full disk, {new} over {earlier}": fill_up(folder, new, earlier)
        for new, earlier in zip(kinds, [*kinds[2:], *kinds[:2]], strict=True)
    }
    results["no room for another file"] = refuse(folder, "nr_inodes=7", 0, "No space left")
    results["a read-only file system"] = refuse(folder, "", _READ_ONLY, "Read-only file system")
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
