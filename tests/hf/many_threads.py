"""Eight threads that load many models each, of several families and types, and what comes of it.

`python -m tests.hf.many_threads FOLDER...` does a little of it with transformers alone, in a process that may be left
broken.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

N_THREADS, N_LOADS = 8, 20
DTYPES = ("float32", "bfloat16")

Load = Callable[[Path, str], Any]


def outcomes(
    load: Load, expected: Mapping[tuple[Path, str], Mapping[str, torch.Tensor]], n_loads: int = N_LOADS
) -> Counter[str]:
    """How often a load was "right", and in what way it was not.

    Args:
        load: (folder, type) -> model.
        expected: (folder, type) -> state dict that it has to have.
        n_loads: by each thread.
    """
    jobs = list(expected)
    begin = threading.Barrier(N_THREADS)
    counts: list[str] = []

    def work(number: int) -> None:
        begin.wait(60)
        for turn in range(n_loads):
            job = jobs[(number + turn) % len(jobs)]
            try:
                counts.append(_verdict(load(*job), expected[job]))
            except Exception as error:  # noqa: BLE001
                counts.append(type(error).__name__)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return Counter(counts)


def _verdict(model: Any, expected: Mapping[str, torch.Tensor]) -> str:
    found = {**model.state_dict(), **dict(model.named_buffers())}
    if found.keys() != expected.keys():
        return "other keys"
    if any(tensor.is_meta for tensor in found.values()):
        return "on meta"
    same = all(tensor.dtype == found[key].dtype and torch.equal(tensor, found[key]) for key, tensor in expected.items())
    return "right" if same and not model.training else "other values"


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """All that a model computes with, copied."""
    state = {**model.state_dict(), **dict(model.named_buffers())}
    return {key: tensor.clone() for key, tensor in state.items()}


def load_by_transformers(folder: Path, dtype: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=dtype)


def main() -> None:
    transformers.logging.set_verbosity_error()
    jobs = [(Path(folder), dtype) for folder in sys.argv[1:] for dtype in DTYPES]
    expected = {job: state_of(load_by_transformers(*job)) for job in jobs}
    counts = outcomes(load_by_transformers, expected, n_loads=5)
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()
