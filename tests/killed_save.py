"""A program that dies at every step of a save, one after the other, and looks at what is left each time.

Run by tests/test_saver.py as a process of its own, because it forks: ``python killed_save.py FOLDER FORMAT``. It
prints a JSON list with an entry for each step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from fastload.loader import load_state_dict
from fastload.saver import save_checkpoint
from fastload.sources.journal import apply_view

STEPS = ("open", "writev", "pwrite", "fsync", "replace", "unlink")


def save(folder: str, generation: int, as_safetensors: bool, *, durability: str = "none") -> None:
    """A checkpoint whose every part tells its generation; each has another number of shards."""
    tensors = {f"{i}.weight": torch.full((100,), generation, dtype=torch.float32) for i in range(4)}
    save_checkpoint(
        tensors,
        folder,
        max_shard_size=(1600, 800, 400)[generation % 3],
        safe_serialization=as_safetensors,
        extra_files={"config.json": json.dumps({"generation": generation})},
        durability=durability,
    )


def generation_in(folder: str) -> int | str:
    """The one generation that all parts of the checkpoint are of; a description if they are not."""
    with open(apply_view(folder, "config.json")) as file:
        found = {json.load(file)["generation"]}
    for tensor in load_state_dict(folder).values():
        found |= set(tensor.tolist())
    return found.pop() if len(found) == 1 else f"a mixture of {found}"


def die_at(step: int) -> None:
    """Have the process killed in place of the step."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def run(folder: str, step: int, as_safetensors: bool) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, 0, not as_safetensors)
    save(folder, 1, as_safetensors)
    child = os.fork()
    if child == 0:
        os.fsync = lambda descriptor: None  # a kill, unlike a power failure, loses nothing that was written
        die_at(step)
        save(folder, 2, as_safetensors, durability="full")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    after_kill = generation_in(folder)
    # The next save is of generation 1's number of shards, or of the other format.
    save(folder, 4, as_safetensors == bool(step % 2))
    return {
        "step": step,
        "finished": os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0,
        "after_kill": after_kill,
        "after_next_save": generation_in(folder),
        "files": sorted(os.listdir(folder)),
    }


def main() -> None:
    folder, as_safetensors = sys.argv[1], sys.argv[2] == "safetensors"
    results = []
    while not results or not results[-1]["finished"]:
        results.append(run(folder, len(results), as_safetensors))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
