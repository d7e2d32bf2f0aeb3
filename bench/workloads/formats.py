"""``.bin`` files beside safetensors, and what a tensor costs where there are many."""

from __future__ import annotations

from suite.checkpoints import bert_base, llama_1b, small_tensors
from suite.outcome import Outcome, Workload, at_least, at_most
from suite.registry import LOADERS, available

from workloads.load import in_process

__all__ = ["BIN", "MANY"]

_COUNTS = (1_000, 10_000)
_MOST = 100_000
_MANY_LOADERS = ("fastload", "safetensors", "runai streamer")


def _measure_bin(rounds: int) -> Outcome:
    makes = {"BERT": ("bert", bert_base), "Llama": ("llama", llama_1b)}
    n_small = 20_000
    runs = {
        "fastload": ("tensors", "fastload .bin", small_tensors(n_small, "bin")),
        "fastload safetensors": ("tensors", "fastload", small_tensors(n_small)),
        "torch.load(mmap)": ("tensors", "torch.load(mmap)", small_tensors(n_small, "bin")),
    }
    for name, (family, make) in makes.items():
        for loader, file_format in (("fastload .bin", "bin"), ("fastload", "safetensors"), ("torch.load(mmap)", "bin")):
            runs[f"{name} {loader}"] = (family, loader, make(file_format))
    measured = in_process(runs, rounds)
    samples = measured.samples
    pairs = {"20,000 tensors": ("fastload", "fastload safetensors")}
    pairs |= {name: (f"{name} fastload .bin", f"{name} fastload") for name in makes}
    targets = [
        at_most(
            f"{what}: .bin / safetensors",
            1.15,
            lambda value, ours=ours, other=other: value(ours, "seconds") / value(other, "seconds"),
            samples,
        )
        for what, (ours, other) in pairs.items()
    ]
    targets.append(
        at_least(
            "20,000 tensors: torch.load(mmap) / fastload",
            6,
            lambda value: value("torch.load(mmap)", "seconds") / value("fastload", "seconds"),
            samples,
        )
    )
    others = [row for row in runs if row.startswith(tuple(makes))]
    return Outcome(rounds=measured, metric="seconds", not_peers=others, targets=tuple(targets))


def _measure_many(rounds: int) -> Outcome:
    names = [name for name in available(LOADERS["tensors"]) if name in _MANY_LOADERS]
    runs = {name: ("tensors", name, small_tensors(_MOST)) for name in names}
    for count in _COUNTS:
        runs |= {f"{name}, {count:,}": ("tensors", name, small_tensors(count)) for name in names[:2]}
    measured = in_process(runs, rounds)
    for row, metrics in measured.samples.items():
        count = int(row.partition(", ")[2].replace(",", "") or _MOST)
        metrics["us_a_tensor"] = [seconds / count * 1e6 for seconds in metrics["seconds"]]
    targets = (
        at_least(
            "safetensors / fastload at 100,000",
            4,
            lambda value: value("safetensors", "seconds") / value("fastload", "seconds"),
            measured.samples,
        ),
        at_most(
            "a tensor of 100,000",
            8,
            lambda value: value("fastload", "us_a_tensor"),
            measured.samples,
            unit="us",
        ),
        at_most(
            "linear: a tensor of 100,000 / a tensor of 1,000",
            1.2,
            lambda value: value("fastload", "us_a_tensor") / value("fastload, 1,000", "us_a_tensor"),
            measured.samples,
        ),
    )
    others = [row for row in runs if ", " in row]
    return Outcome(rounds=measured, metric="seconds", not_peers=others, targets=targets)


BIN = Workload(
    name="bin",
    title="20,000 tensors, BERT-base and Llama 1.1B as .bin, later loads in one process, files in the page cache",
    measure=_measure_bin,
    rounds=7,
)
MANY = Workload(
    name="many",
    title="100,000 tensors of 1 KB as a dict, later loads in one process, file in the page cache",
    measure=_measure_many,
    rounds=7,
)
