"""From arguments to an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from fastload.cli.arguments import build_parser
from fastload.cli.output import printable
from fastload.errors import FastloadError, OptionError

__all__ = ["main"]

GOOD = 0
FAILED = 1
USAGE = 2
# As a shell reports a program that a signal ended: 128 and the signal's number.
INTERRUPTED = 130
PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Errors of fastload's own go to stderr as their message.

    Args:
        argv: the arguments; None for those of the process.
    """
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, the version, or what is wrong
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        # A command's module is imported when it runs, so that inspecting does not wait for torch.
        status: int = import_module(arguments.module).run(arguments)
        sys.stdout.flush()
    except FastloadError as error:
        print(f"fastload: {printable(str(error), lines=True)}", file=sys.stderr)
        return USAGE if isinstance(error, OptionError) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return PIPE_CLOSED
    return status


def _discard_stdout() -> None:
    """Lead what is still buffered nowhere, so that the interpreter does not fail on it when it ends."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
