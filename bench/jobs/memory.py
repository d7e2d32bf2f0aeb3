"""Private memory that a load takes: ``memory.py LOADER FOLDER DTYPE``, DTYPE being a name of torch's or ``same``.

The process imports the library's model class first, so that code is not counted; the load is the first of the
process.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from pathlib import Path

import torch
from suite.fingerprint import fingerprint
from suite.fresh import finish
from suite.loaders import BERT_LOADERS
from suite.memory import PrivatePeak, private_bytes


def main(loader: str, folder: Path, dtype_name: str) -> None:
    """Load once, between two looks at the process's anonymous memory."""
    load = BERT_LOADERS[loader].load
    dtype = None if dtype_name == "same" else getattr(torch, dtype_name)
    for module, name in _used(loader):
        getattr(import_module(module), name)
    gc.collect()
    before = private_bytes()
    with PrivatePeak() as watch:
        model = load(folder, dtype)
    grown = private_bytes() - before
    n_cast = 0 if dtype is None else sum(tensor.nbytes for tensor in model.state_dict().values())
    finish(
        metrics={
            "growth_bytes": grown,
            "beyond_cast_bytes": grown - n_cast,
            "peak_beyond_cast_bytes": watch.peak_bytes - before - n_cast,
        },
        digest=fingerprint(model.state_dict()),
    )


def _used(loader: str) -> list[tuple[str, str]]:
    """The model class that a loader uses, and what it is called by: (module, name)."""
    if loader == "fastload.hf":
        return [("transformers", "BertModel"), ("fastload.hf", "AutoModel")]
    return [("fastload" if loader.startswith("fastload") else "transformers", "BertModel")]


main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
