"""One worker of several: ``worker.py FAMILY LOADER FOLDER TINY``. It goes on at each line on its stdin.

After a tiny load it says "ready"; then it loads, reads every byte and says what it found; then it ends.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from suite.fingerprint import fingerprint_of
from suite.registry import LOADERS


def main(family: str, loader: str, folder: Path, tiny: Path) -> None:
    """Load and read. The model is held until the last line has come."""
    torch.set_num_threads(1)
    load = LOADERS[family][loader].load
    load(tiny)
    gc.collect()
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    model = load(folder)
    gc.collect()
    print(json.dumps(fingerprint_of(model)), flush=True)
    sys.stdin.readline()


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
