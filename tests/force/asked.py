"""A program that counts what a load asks of the file system by name, as a server of many ranks would see it.

Run by test_loads_by_force.py as a process of its own, because it forks: ``python -m tests.force.asked FOLDER``. It
prints a JSON object: how the load ended, and name in the checkpoint's folder -> the calls that named it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

from fastload.models.decoder_families import LlamaConfig, LlamaForCausalLM
from tests.force.syscalls import READS, run_traced

# Calls that take a path; of the others one is with a descriptor what it is with a path.
_BY_NAME = {"open", "openat", "openat2", "stat", "lstat", "newfstatat", "statx", "access", "readlink", "statfs"}


def load(folder: str) -> None:
    try:
        LlamaForCausalLM.from_pretrained(folder)
    except BaseException:
        traceback.print_exc()
        raise


def main() -> None:
    folder = os.path.realpath(sys.argv[1])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).save_pretrained(folder, max_shard_size="40KB")
    os.utime(folder, (1e9, 1e9))  # as it was left long ago
    load(folder)
    calls, status = run_traced(lambda: load(folder), folder, READS, lambda *_: None)
    asked: dict[str, list[str]] = {}
    for name, paths in calls:
        # Of newfstatat with a descriptor and no path, both are of the same file.
        if name in _BY_NAME and len(paths) == 1:
            asked.setdefault(paths[0], []).append(name)
    print(json.dumps({"status": status, "asked": asked}))


if __name__ == "__main__":
    main()
