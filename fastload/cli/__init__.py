"""The command line: look into a checkpoint, plan its load, load, convert, verify and time it.

    fastload inspect DIR        what is in it; reads headers only and does not import torch
    fastload plan DIR           what a load would map, copy, cast and decode; reads no weights
    fastload load DIR           load it and print the report
    fastload convert DIR OUT    another format, other shards, another dtype
    fastload verify DIR         read every byte and say whether it is whole
    fastload bench DIR          what loading and running it takes, beside transformers

Exit status: 0 for good, 1 for a checkpoint that is bad or a command that failed, 2 for arguments that cannot be meant.
"""

from __future__ import annotations

from fastload.cli.app import main as main
