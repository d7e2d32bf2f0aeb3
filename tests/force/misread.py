"""A program whose loads meet an error of the system, or short reads, at every call that reads.

Run by test_loads_by_force.py as a process of its own, because it forks: ``python -m tests.force.misread FOLDER``. It
prints a JSON object with an entry for each kind of fault.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastload.checkpoint import open_checkpoint
from fastload.errors import FastloadError
from fastload.loader import load_state_dict
from fastload.sources.journal import apply_view
from fastload.storage.reading import ReadFile
from tests.conftest import same_bytes
from tests.force.saves import KINDS, save, tensors_of
from tests.force.syscalls import CHANGES, KILL, READS, Call, Fault, cut, refusal, run_traced

_TOLD, _WRONG = 3, 4
_OTHER_CONTAINERS = ("legacy", "journal")


def mapped(folder: str) -> Mapping[str, torch.Tensor]:
    """The tensors as views of the files."""
    return load_state_dict(folder)


def read(folder: str) -> Mapping[str, torch.Tensor]:
    """The tensors read into memory of their own, as from a network file system."""
    checkpoint = open_checkpoint(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in checkpoint.files:
        specs = [spec for spec in checkpoint.specs.values() if spec.region.file == path]
        file = ReadFile(path, checkpoint.n_file_bytes(path), checkpoint.modified_ns(path))
        tensors |= zip((spec.key for spec in specs), file.tensors(specs), strict=True)
    return tensors | {name: tensors[kept] for name, kept in checkpoint.aliases.items()}


WAYS: dict[str, Callable[[str], Mapping[str, torch.Tensor]]] = {"mapped": mapped, "read": read}


def make(folder: str) -> list[str]:
    """A folder of every kind: those that are saved, a file of torch's older format, a save that was killed half-way."""
    for kind in KINDS:
        save(os.path.join(folder, kind), 1, kind)
    os.mkdir(os.path.join(folder, "legacy"))
    path = os.path.join(folder, "legacy", "pytorch_model.bin")
    torch.save(tensors_of(1), path, _use_new_zipfile_serialization=False)
    killed, n_renames = os.path.join(folder, "journal"), 0

    def decide(_: int, call: Call) -> Fault | None:
        nonlocal n_renames
        n_renames += call.name == "rename"
        return KILL if n_renames == 3 else None

    os.mkdir(killed)
    run_traced(lambda: save(killed, 1, "3 safetensors"), killed, CHANGES, decide)
    assert apply_view(killed, "config.json").endswith("-config.json")
    return [*KINDS, *_OTHER_CONTAINERS]


def _load(way: str, folder: str) -> None:
    """Load, and end with a status that says what came of it."""
    try:
        tensors = WAYS[way](folder)
    except FastloadError as error:
        if str(error.file).startswith(folder):
            os._exit(_TOLD)
        print(f"an error that does not name the file: {error}", file=sys.stderr)
        raise
    except BaseException:
        traceback.print_exc()
        raise
    expected = tensors_of(1)
    if tensors.keys() != expected.keys() or not all(same_bytes(tensors[key], expected[key]) for key in expected):
        os._exit(_WRONG)


def load_everywhere(folder: str, kinds: list[str], fault: Fault, *, everywhere: bool = False) -> dict[str, Any]:
    """Loads of every kind and in every way, with a fault at the first call, then at the second, and so on.

    Args:
        folder: where the checkpoints are.
        kinds: their names.
        fault: what becomes of one call.
        everywhere: of every call at once instead.
    """
    told, unharmed, problems = 0, 0, []
    for kind in kinds:
        for way in WAYS:
            path, count = os.path.join(folder, kind), 0
            while True:

                def decide(n_before: int, _: Call, count: int = count) -> Fault | None:
                    return fault if everywhere or n_before == count else None

                calls, status = run_traced(lambda way=way, path=path: _load(way, path), path, READS, decide)
                if count >= len(calls):
                    break
                told += status == _TOLD
                unharmed += status == 0
                if status not in (0, _TOLD) or (everywhere and status):
                    problems.append(f"{kind}, {way}, {calls[count]}: ended with {status}")
                count += 1
                if everywhere:
                    break
    return {"faults": told + unharmed + len(problems), "told": told, "unharmed": unharmed, "problems": problems}


def main() -> None:
    folder = os.path.realpath(sys.argv[1])
    kinds = make(folder)
    chosen = {
        errno.EIO: ["2 bin", "journal"],
        errno.EACCES: ["safetensors"],
        errno.EMFILE: ["legacy"],
        errno.ENOMEM: ["bin"],
    }
    results = {
        errno.errorcode[number]: load_everywhere(folder, some, refusal(number)) for number, some in chosen.items()
    }
    for n_bytes in (1, 100, 4095):
        results[f"reads of at most {n_bytes} bytes"] = load_everywhere(folder, kinds, cut(n_bytes), everywhere=True)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
