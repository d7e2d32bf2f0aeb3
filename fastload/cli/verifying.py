"""``fastload verify``: is a checkpoint whole, down to its last byte?"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from fastload.checkpoint import Checkpoint
from fastload.cli.arguments import Where
from fastload.cli.native import native_class, plan_native
from fastload.cli.output import print_json, print_line
from fastload.errors import (
    FastloadError,
    KeyMatchError,
    OptionError,
    TruncatedFileError,
    UnreadableFileError,
)
from fastload.formats.detection import read_file
from fastload.integrity import compare_with_archive, compare_with_checksums, compare_with_hub_name
from fastload.progress import Progress
from fastload.reports import collapse_keys, format_bytes
from fastload.sources.local import CheckpointFiles

__all__ = ["run"]

_CHUNK_BYTES = 4 << 20


def run(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked, print all that is wrong, and return 1 if anything is."""
    where = Where.of(arguments)
    problems: list[FastloadError] = []
    checked: list[str] = []
    try:
        files = where.locate()
        checked += _check_files(files, problems)
        if not problems:
            checked += _check_contents(Checkpoint(files), where)
    except OptionError:
        raise
    except FastloadError as error:
        problems.append(error)
    if arguments.json:
        errors = [{"kind": type(error).__name__, "file": error.file, "message": str(error)} for error in problems]
        print_json({"source": where.path, "ok": not problems, "checked": checked, "errors": errors})
    else:
        for line in checked:
            print_line(f"  {line}")
        for problem in problems:
            print_line(f"BAD  {problem}")
        verdict = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "OK"
        print_line(f"{where.path}: {verdict}")
    return 1 if problems else 0


def _check_files(files: CheckpointFiles, problems: list[FastloadError]) -> Iterator[str]:
    """Each file's header, and each of its bytes. One bad file does not hide the next."""
    with Progress("reading", sum(map(os.path.getsize, files.weights))) as progress:
        for path in files.weights:
            try:
                yield _check_file(path, files.checksums.get(path), progress)
            except FastloadError as problem:  # noqa: PERF203  a file takes longer than a try
                problems.append(problem)


def _check_file(path: str, header: str | None, progress: Progress) -> str:
    contents = read_file(path)
    ways = {
        "checksums": compare_with_checksums(path, header, progress.advance),
        "SHA-256 of the hub": compare_with_hub_name(path, progress.advance),
        "CRC-32": compare_with_archive(path, progress.advance),
    }
    compared = " and ".join(way for way, is_compared in ways.items() if is_compared)
    if not compared:
        _read_through(path, contents.n_file_bytes, progress)
    n_tensors, size = len(contents.specs), format_bytes(contents.n_file_bytes)
    done = f"compared with {compared}" if compared else "read; it has no checksums to be compared with"
    return f"{os.path.basename(path)}: {n_tensors:,} tensors, {size} {done}"


def _read_through(path: str, n_file_bytes: int, progress: Progress) -> None:
    """Read a file from end to end. Read and not mapped, because there an error of the disk ends the process."""
    buffer = bytearray(_CHUNK_BYTES)
    n_read = 0
    try:
        with open(path, "rb", buffering=0) as file:
            while n_bytes := file.readinto(buffer):
                n_read += n_bytes
                progress.advance(n_bytes)
    except OSError as error:
        raise UnreadableFileError(
            "a file could not be read to its end",
            file=path,
            found=f"{error.strerror}, after {n_read:,} bytes",
            fix="fetch the file again, and look at the health of the disk",
        ) from error
    if n_read < n_file_bytes:
        raise TruncatedFileError(
            "a file was cut while it was read",
            file=path,
            expected=f"{n_file_bytes:,} bytes",
            found=f"{n_read:,}",
            fix="wait until whoever writes it is done, then verify again",
        )


def _check_contents(checkpoint: Checkpoint, where: Where) -> Iterator[str]:
    """What only the whole checkpoint shows: encoded tensors decode, the index fits, the model would be whole."""
    encoded = [spec for spec in checkpoint.specs.values() if spec.region.encoding is not None]
    for spec in encoded:
        file = checkpoint.open_file(spec.region.file)
        file.tensor(spec)
        file.release(spec.region)
    if encoded:
        yield f"{len(encoded):,} compressed or big-endian tensors decoded"
    for note in checkpoint.notes:
        yield f"note: {note}"
    model_class = native_class(where)
    if model_class is None:
        yield "the model is of no native family: its keys were not checked"
        return
    plan = plan_native(model_class, checkpoint, where, None)
    for row in collapse_keys(plan.keys.unexpected):
        yield f"not in a {model_class.__name__}: {row}"
    lacking = [f"{row} is missing" for row in collapse_keys(plan.keys.missing)]
    lacking += [
        f"{fqn} is {list(in_file)}, the model needs {list(in_model)}" for fqn, in_file, in_model in plan.mismatched
    ]
    if lacking:
        raise KeyMatchError(
            f"a {model_class.__name__} would not be whole",
            file=where.path,
            expected="every parameter that the config asks for",
            found="\n            ".join(lacking),
            fix="fetch the weights and the config again; they do not belong together",
        )
    yield f"{len(plan.rows):,} tensors fill a {model_class.__name__}"
