"""Tokens from a model that fills the machine's memory, or more: ``large.py FOLDER LIMIT_BYTES BUDGET_BYTES N_TOKENS``.

LIMIT_BYTES is that of a control group, BUDGET_BYTES fastload's ``memory_budget``; 0 for none.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import torch
from suite.checkpoints import weight_files
from suite.cold import drop_cached
from suite.fresh import finish
from suite.limited import limited
from suite.memory import private_bytes

from fastload import AutoModelForCausalLM

_PROMPT = [[128000, 1000, 1001, 1002, 1003, 1004, 1005, 1006]]


def main(folder: Path, limit_bytes: int, budget: int, n_tokens: int) -> None:
    """Load from cold files, generate greedily, and say when each token was there."""
    torch.ones(512, 512) @ torch.ones(512, 512)
    drop_cached(weight_files(folder))
    tokens, at = [], []
    with limited(limit_bytes) if limit_bytes else nullcontext():
        begun = perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, memory_budget=budget or None)
        for token in model.stream(torch.tensor(_PROMPT), max_new_tokens=n_tokens, do_sample=False):
            tokens.append(int(token[0]))
            at.append(perf_counter() - begun)
        n_private_bytes = private_bytes()
        del model
    later = [after - before for before, after in pairwise(at)]
    metrics = {"first_token_s": at[0], "seconds": min(later), "private_bytes": n_private_bytes}
    finish(metrics=metrics, tokens=tokens)


main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
