"""One check of a file's bytes in a fresh process: ``verify.py WAY FILE``.

The file is in the page cache. ``checksums`` compares it with the checksums in its header, as ``verify=True`` does, and
sees after the clock has stopped that a flipped bit is found. ``sha256`` is what a hub's name is compared with. ``read``
is the floor: the bytes are in memory of the process, all of torch's threads sum them, and that is all.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from time import perf_counter

from suite.fresh import finish


def main(way: str, path: str) -> None:
    """Check or read once, after a first time that imports what is needed."""
    run = {"checksums": _checksums, "read": _read, "sha256": _sha256}[way](path)
    run()
    begun = perf_counter()
    run()
    seconds = perf_counter() - begun
    if way == "checksums":
        _see_that_a_flipped_bit_is_found(run, path)
    finish(metrics={"seconds": seconds})


def _checksums(path: str) -> Callable[[], None]:
    from fastload.integrity import require_integrity

    return lambda: require_integrity([path], {})


def _see_that_a_flipped_bit_is_found(run: Callable[[], None], path: str) -> None:
    from fastload.errors import IntegrityError

    at = os.path.getsize(path) // 2
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
        try:
            run()
        except IntegrityError:
            return
        finally:
            os.pwrite(file.fileno(), byte, at)
    raise AssertionError("a flipped bit was not found")


def _read(path: str) -> Callable[[], None]:
    import torch

    data = torch.from_file(path, size=os.path.getsize(path) // 8, dtype=torch.int64).clone()
    expected = int(data.sum())

    def run() -> None:
        if int(data.sum()) != expected:
            raise AssertionError("the bytes were not all read")

    return run


def _sha256(path: str) -> Callable[[], None]:
    def run() -> None:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(4 << 20))
        with open(path, "rb", buffering=0) as file:
            while n_bytes := file.readinto(buffer):
                digest.update(buffer[:n_bytes])

    return run


main(sys.argv[1], sys.argv[2])
