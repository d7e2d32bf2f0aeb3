"""A load and the first forward, the files not in the page cache."""

from __future__ import annotations

from suite.checkpoints import llama_1b, n_weight_bytes, warm_up
from suite.fingerprint import same_output
from suite.outcome import Outcome, Workload, at_least, at_most
from suite.rounds import Rounds
from suite.turns import in_turns

__all__ = ["FIRST_FORWARD", "STREAM"]

_LOADERS = ("fastload", "transformers", "accelerate", "safetensors")
# A forward of so many takes about as long as the file takes to be read: there is something to overlap.
_N_PROMPT = 64


def _measure(rounds: int) -> Outcome:
    folder, tiny = llama_1b(), llama_1b(tiny=True)
    rows = {loader: ("cold", "llama", loader, str(folder), str(tiny), "cold", "4") for loader in (*_LOADERS, "disk")}
    measured, outputs = in_turns(rows, rounds, "output")
    same_output(outputs)
    targets = (
        at_least(
            "transformers / fastload",
            1.7,
            lambda value: value("transformers", "seconds") / value("fastload", "seconds"),
            measured.samples,
        ),
        at_least(
            "share of the disk's best rate",
            75,
            lambda value: value("disk", "seconds") / value("fastload", "seconds") * 100,
            measured.samples,
            unit="%",
        ),
    )
    return Outcome(rounds=measured, metric="seconds", limit="disk", n_bytes=n_weight_bytes(folder), targets=targets)


def _measure_stream(rounds: int) -> Outcome:
    folder, tiny = llama_1b(), llama_1b(tiny=True)
    rows = {
        row: ("cold", "later", loader, str(folder), str(tiny), state, str(_N_PROMPT))
        for row, loader, state in (
            ("fastload", "stream", "cold"),
            ("read, then forward", "read", "cold"),
            ("mapped", "mapped", "cold"),
            ("transformers", "transformers", "cold"),
            ("warm, stream", "stream", "warm"),
            ("warm, mapped", "mapped", "warm"),
        )
    }
    # Apart, or it would always be the same row that comes after a warm one, and finds other memory free.
    measured, outputs = in_turns(
        {row: command for row, command in rows.items() if command[-2] == "cold"}, rounds, "output"
    )
    warm_up(folder)
    warm, more = in_turns({row: command for row, command in rows.items() if command[-2] == "warm"}, rounds, "output")
    measured = Rounds(measured.samples | warm.samples, measured.n_disturbed + warm.n_disturbed)
    outputs |= more
    same_output(outputs)
    targets = (
        at_least(
            "read, then forward / fastload",
            1.3,
            lambda value: value("read, then forward", "seconds") / value("fastload", "seconds"),
            measured.samples,
        ),
        at_most(
            "warm: stream / mapped",
            1.05,
            lambda value: value("warm, stream", "seconds") / value("warm, mapped", "seconds"),
            measured.samples,
        ),
    )
    return Outcome(rounds=measured, metric="seconds", not_peers=("warm, stream", "warm, mapped"), targets=targets)


FIRST_FORWARD = Workload(
    name="first-forward-cold",
    title="Llama 1.1B bf16, load and first forward of 4 tokens, the file's cached pages dropped",
    measure=_measure,
    rounds=5,
)
STREAM = Workload(
    name="stream-cold",
    title=f"Llama 1.1B bf16, load and first forward of {_N_PROMPT} tokens, the file's cached pages dropped",
    measure=_measure_stream,
    rounds=5,
)
