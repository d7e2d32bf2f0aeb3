"""A program that dies at every step of saving a model, one after the other, and looks at what is left each time.

Run by tests/hf/test_saving_safely.py as a process of its own, because it forks: ``killed_hf_save.py WHOSE FOLDER``,
where WHOSE is ``fastload`` or ``transformers``. It prints a JSON list with an entry for each step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from typing import Any

import torch
from safetensors import torch as safetensors_torch
from transformers import BertForMaskedLM, modeling_utils

from fastload.hf.saving import save_pretrained
from fastload.loader import load_state_dict
from fastload.sources.journal import apply_view
from tests.hf.saved import made
from tests.killed_save import die_at


def model_of(generation: int) -> Any:
    """A model whose every weight, and whose config, tells its generation."""
    model = made("bert")
    model.config.generation = generation
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(generation)
    return model


def generation_in(folder: str) -> int | str:
    """The one generation that all parts of the checkpoint are of; a description if they are not."""
    with open(apply_view(folder, "config.json")) as file:
        found = {json.load(file)["generation"]}
    for tensor in load_state_dict(folder).values():
        found |= set(tensor.unique().tolist())
    return found.pop() if len(found) == 1 else f"a mixture of {found}"


def generation_loaded(folder: str) -> int | str:
    """The same, of what transformers loads."""
    model = BertForMaskedLM.from_pretrained(folder)
    found = {model.config.generation}
    for parameter in model.parameters():
        found |= set(parameter.unique().tolist())
    return found.pop() if len(found) == 1 else f"a mixture of {found}"


def die_after_shard(count: int) -> None:
    """Have the process killed when transformers has written so many shards."""
    n_written = 0

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal n_written
        safetensors_torch.save_file(*args, **kwargs)
        n_written += 1
        if n_written == count:
            os.kill(os.getpid(), signal.SIGKILL)

    modeling_utils.safe_save_file = counted


def run(whose: str, folder: str, step: int) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    model_of(1).save_pretrained(folder, max_shard_size="20KB")
    child = os.fork()
    if child == 0:
        if whose == "fastload":
            os.fsync = lambda descriptor: None  # a kill, unlike a power failure, loses nothing that was written
            die_at(step)
            save_pretrained(model_of(2), folder, max_shard_size="30KB" if step % 2 else "1GB")
        else:
            die_after_shard(step + 1)
            model_of(2).save_pretrained(folder, max_shard_size="20KB")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    finished = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    if whose == "transformers":
        return {"finished": finished, "after_kill": generation_loaded(folder)}
    after_kill = generation_in(folder)
    save_pretrained(model_of(3), folder, max_shard_size="40KB")
    return {"finished": finished, "after_kill": after_kill, "after_next_save": generation_loaded(folder)}


def main() -> None:
    whose, folder = sys.argv[1:]
    results: list[dict[str, Any]] = []
    # Odd and even steps save another number of shards, and take another number of steps.
    while not all(result["finished"] for result in results[-2:]) or len(results) < 2:
        results.append(run(whose, folder, len(results)))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
