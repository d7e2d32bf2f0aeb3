"""Loads that have to change or rearrange bytes, each in a fresh process: fused experts, casts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from suite.checkpoints import llama_1b, moe, n_weight_bytes, warm_up
from suite.fingerprint import same_digest
from suite.outcome import Outcome, Workload, at_least, at_most
from suite.rounds import Rounds
from suite.turns import in_turns

__all__ = ["CAST", "CAST_LAZY", "MOE"]


def _measured(
    family: str, make: Callable[..., Path], loaders: tuple[str, ...], dtype: str, rounds: int, n_limit_bytes: int = 0
) -> Rounds:
    """All loaders, and if asked for the bare way to write so many pages. Their results must be the same."""
    folder, tiny = make(), make(tiny=True)
    warm_up(folder)
    commands: dict[str, tuple[str, ...]] = {
        loader: ("load_once", family, loader, str(folder), str(tiny), dtype) for loader in loaders
    }
    if n_limit_bytes:
        commands["fresh pages"] = ("fresh_pages", str(n_limit_bytes))
    measured, digests = in_turns(commands, rounds, "digest")
    same_digest(digests)
    return measured


def _measure_moe(rounds: int) -> Outcome:
    measured = _measured("moe", moe, ("fastload", "fastload.hf", "transformers", "safetensors"), "same", rounds)
    n_bytes = n_weight_bytes(moe())
    targets = (
        at_least(
            "transformers / fastload",
            12,
            lambda value: value("transformers", "seconds") / value("fastload", "seconds"),
            measured.samples,
        ),
        at_least(
            "transformers / fastload.hf",
            12,
            lambda value: value("transformers", "seconds") / value("fastload.hf", "seconds"),
            measured.samples,
        ),
        *(
            at_most(
                f"{ours}: private memory / weights",
                5,
                lambda value, ours=ours: value(ours, "growth_bytes") / n_bytes * 100,
                measured.samples,
                unit="%",
            )
            for ours in ("fastload", "fastload.hf")
        ),
    )
    return Outcome(rounds=measured, metric="seconds", n_bytes=n_bytes, targets=targets)


def _measure_cast(rounds: int) -> Outcome:
    n_cast_bytes = 2 * n_weight_bytes(llama_1b())
    loaders = ("fastload", "fastload.hf", "transformers", "accelerate", "safetensors")
    measured = _measured("llama", llama_1b, loaders, "float32", rounds, n_cast_bytes)
    targets = (
        at_least(
            "transformers / fastload",
            1.3,
            lambda value: value("transformers", "seconds") / value("fastload", "seconds"),
            measured.samples,
        ),
        at_least(
            "transformers / fastload.hf",
            1.3,
            lambda value: value("transformers", "seconds") / value("fastload.hf", "seconds"),
            measured.samples,
        ),
        at_most(
            "fastload / fresh pages",
            1.1,
            lambda value: value("fastload", "seconds") / value("fresh pages", "seconds"),
            measured.samples,
        ),
        at_most(
            "peak private memory beyond the result",
            128,
            lambda value: (value("fastload", "peak_growth_bytes") - n_cast_bytes) / 1e6,
            measured.samples,
            unit="MB",
        ),
    )
    return Outcome(rounds=measured, metric="seconds", limit="fresh pages", n_bytes=n_cast_bytes, targets=targets)


def _measure_cast_lazy(rounds: int) -> Outcome:
    folder, tiny = llama_1b(), llama_1b(tiny=True)
    warm_up(folder)
    commands = {
        row: ("load_once", "later", loader, str(folder), str(tiny), "float32")
        for row, loader in (("fastload", "lazy"), ("transformers", "transformers"))
    }
    measured, digests = in_turns(commands, rounds, "digest")
    same_digest(digests)
    target = at_least(
        "transformers / fastload",
        20,
        lambda value: value("transformers", "seconds") / value("fastload", "seconds"),
        measured.samples,
    )
    return Outcome(rounds=measured, metric="seconds", targets=(target,))


MOE = Workload(
    name="moe",
    title="Qwen3-MoE, 24 layers x 128 experts in bf16, 9,435 tensors to be fused, files in the page cache",
    measure=_measure_moe,
    rounds=3,
)
CAST = Workload(
    name="cast",
    title="Llama 1.1B, bf16 files to an fp32 model, files in the page cache",
    measure=_measure_cast,
    rounds=5,
)
CAST_LAZY = Workload(
    name="cast-lazy",
    title="Llama 1.1B, bf16 files to an fp32 model, lazy=True: the load itself, files in the page cache",
    measure=_measure_cast_lazy,
    rounds=5,
)
