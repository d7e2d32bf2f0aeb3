"""Forwards of a model that does not fit into memory: ``bigger.py LOADER FOLDER LIMIT_BYTES BUDGET N_TOKENS``.

LOADER is fastload (native, within BUDGET bytes), transformers (mapped) or accelerate (offload to disk). LIMIT_BYTES is
that of a control group; 0 for none.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from suite.checkpoints import weight_files
from suite.cold import drop_cached, read_seconds
from suite.fresh import finish
from suite.limited import limited

# Steps of one token are short, and experts that are kept come to be those that are used.
_N_FORWARDS = 4
_N_STEPS = 12
_MODULES = ("transformers.models.llama.modeling_llama", "fastload.models.decoder_families")


def _fastload(folder: Path, budget: int, scratch: str) -> Any:
    from fastload import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, memory_budget=budget or None)


def _transformers(folder: Path, budget: int, scratch: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def _accelerate(folder: Path, budget: int, scratch: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map="auto", max_memory={"cpu": budget}, offload_folder=scratch
    )


_LOADERS = {"fastload": _fastload, "transformers": _transformers, "accelerate": _accelerate}


def main(loader: str, folder: Path, limit_bytes: int, budget: int, n_tokens: int) -> None:
    """Load, run some forwards, and say how long those of the second half took."""
    if loader == "disk":
        ways = read_seconds(weight_files(folder)[0])
        finish(metrics={"seconds": min(ways.values())})
        return
    scratch = tempfile.mkdtemp()
    # Imports and torch's threads are there before the limit, as their files count for whoever reads them first.
    torch.ones(512, 512) @ torch.ones(512, 512)
    import_module(_MODULES[loader == "fastload"])
    drop_cached(weight_files(folder))
    try:
        with limited(limit_bytes) if limit_bytes else nullcontext():
            model = _LOADERS[loader](folder, budget, scratch)
            seconds = []
            with torch.inference_mode():
                for at in range(_N_STEPS if n_tokens == 1 else _N_FORWARDS):
                    ids = torch.arange(1000, 1000 + n_tokens).unsqueeze(0) + at
                    begun = perf_counter()
                    logits = model(ids).logits
                    seconds.append(perf_counter() - begun)
            output = logits.float().flatten()[::997].tolist()
            del model
    finally:
        shutil.rmtree(scratch)
    finish(metrics={"seconds": median(seconds[len(seconds) // 2 :]), "first_s": seconds[0]}, output=output)


main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]))
