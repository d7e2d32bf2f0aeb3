"""Large-model inference: first tokens, decoding, models that do not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from suite.checkpoints import llama_1b, llama_8b, moe, n_weight_bytes, warm_up
from suite.fingerprint import same_output
from suite.limited import reason_for_no_limit
from suite.outcome import Outcome, Workload, at_least, at_most
from suite.turns import in_turns

__all__ = ["BIGGER", "BIGGER_MOE", "DECODE", "LARGE", "TTFT_LLAMA", "TTFT_LLAMA_COLD", "TTFT_MOE"]

_LLAMA_LIMIT_BYTES = 1_200_000_000
_LLAMA_BUDGET_BYTES = 900_000_000
_MOE_LIMIT_BYTES = 800_000_000
_MOE_BUDGET_BYTES = 550_000_000
_LARGE_LIMIT_BYTES = 5_000_000_000
_LARGE_BUDGET_BYTES = 4_000_000_000
_N_TOKENS = 64


def _same_tokens(tokens: Mapping[str, list[int]]) -> None:
    if len(set(map(tuple, tokens.values()))) > 1:
        raise AssertionError(f"the tokens differ: {tokens}")


def _first_token(rounds: int, make: Callable[[], Path], state: str, bound: float) -> Outcome:
    folder = make()
    warm_up(folder)
    commands = {library: ("first_token", library, str(folder), state, "1") for library in ("fastload", "transformers")}
    measured, tokens = in_turns(commands, rounds, "tokens")
    _same_tokens(tokens)
    target = at_least(
        "transformers / fastload",
        bound,
        lambda value: value("transformers", "seconds") / value("fastload", "seconds"),
        measured.samples,
    )
    return Outcome(rounds=measured, metric="seconds", targets=(target,))


def _decode(rounds: int) -> Outcome:
    commands = {
        row: ("first_token", library, str(folder), "warm", str(_N_TOKENS))
        for name, folder in (("", llama_1b()), ("MoE ", moe()))
        for library in ("fastload", "transformers")
        for row in (f"{name}{library}",)
    }
    for folder in (llama_1b(), moe()):
        warm_up(folder)
    measured, _ = in_turns(commands, rounds, "tokens")
    targets = tuple(
        at_least(
            f"{name}transformers / fastload",
            1,
            lambda value, name=name: value(f"{name}transformers", "decode_s") / value(f"{name}fastload", "decode_s"),
            measured.samples,
        )
        for name in ("", "MoE ")
    )
    return Outcome(rounds=measured, metric="decode_s", not_peers=("MoE fastload", "MoE transformers"), targets=targets)


def _bigger(rounds: int) -> Outcome:
    if reason := reason_for_no_limit():
        raise SystemExit(reason)
    folder, limit = llama_1b(), str(_LLAMA_LIMIT_BYTES)
    budget = str(_LLAMA_BUDGET_BYTES)
    commands = {
        row: ("bigger", row, str(folder), limit, budget, "4") for row in ("fastload", "transformers", "accelerate")
    }
    measured, outputs = in_turns(commands | {"disk": ("bigger", "disk", str(folder), "0", "0", "4")}, rounds, "output")
    same_output(outputs)
    not_resident = (n_weight_bytes(folder) - _LLAMA_BUDGET_BYTES) / n_weight_bytes(folder)
    targets = (
        at_least("transformers / fastload", 2, lambda value: _ratio(value, "transformers"), measured.samples),
        at_least("accelerate / fastload", 3, lambda value: _ratio(value, "accelerate"), measured.samples),
        at_least(
            "share of the disk's best rate, for the bytes beyond the budget",
            75,
            lambda value: value("disk", "seconds") * not_resident / value("fastload", "seconds") * 100,
            measured.samples,
            unit="%",
        ),
    )
    return Outcome(rounds=measured, metric="seconds", not_peers=("disk",), targets=targets)


def _bigger_moe(rounds: int) -> Outcome:
    if reason := reason_for_no_limit():
        raise SystemExit(reason)
    folder = moe()
    commands = {
        "fastload": ("bigger", "fastload", str(folder), str(_MOE_LIMIT_BYTES), str(_MOE_BUDGET_BYTES), "1"),
        "unlimited": ("bigger", "fastload", str(folder), "0", "0", "1"),
    }
    measured, outputs = in_turns(commands, rounds, "output")
    same_output(outputs)
    target = at_most("fastload / unlimited", 3, lambda value: 1 / _ratio(value, "unlimited"), measured.samples)
    return Outcome(rounds=measured, metric="seconds", targets=(target,))


def _large(rounds: int) -> Outcome:
    if reason := reason_for_no_limit():
        raise SystemExit(reason)
    folder = llama_8b()
    commands = {
        "fastload": ("large", str(folder), str(_LARGE_LIMIT_BYTES), str(_LARGE_BUDGET_BYTES), "4"),
        "unlimited": ("large", str(folder), "0", "0", "4"),
        "disk": ("bigger", "disk", str(llama_1b()), "0", "0", "0"),
    }
    measured, tokens = in_turns(commands, rounds, "tokens")
    _same_tokens(tokens)
    n_passing_bytes = n_weight_bytes(folder) - _LARGE_BUDGET_BYTES
    target = at_least(
        "share of the disk's best rate, for the bytes beyond the budget",
        75,
        lambda value: (
            value("disk", "seconds") / n_weight_bytes(llama_1b()) * n_passing_bytes / value("fastload", "seconds") * 100
        ),
        measured.samples,
        unit="%",
    )
    return Outcome(rounds=measured, metric="seconds", not_peers=("disk",), targets=(target,))


def _ratio(value: Callable[[str, str], float], peer: str) -> float:
    return value(peer, "seconds") / value("fastload", "seconds")


TTFT_LLAMA = Workload(
    name="ttft-llama",
    title="Llama 1.1B bf16, fresh process to first token, files in the page cache",
    measure=partial(_first_token, make=llama_1b, state="warm", bound=2),
    rounds=7,
)
TTFT_LLAMA_COLD = Workload(
    name="ttft-llama-cold",
    title="Llama 1.1B bf16, fresh process to first token, the file's cached pages dropped",
    measure=partial(_first_token, make=llama_1b, state="cold", bound=2),
    rounds=5,
)
TTFT_MOE = Workload(
    name="ttft-moe",
    title="Qwen3-MoE, 24 layers x 128 experts in bf16, fresh process to first token, files in the page cache",
    measure=partial(_first_token, make=moe, state="warm", bound=4),
    rounds=5,
)
DECODE = Workload(
    name="decode",
    title=f"{_N_TOKENS} tokens after a prompt of 8, greedy, Llama 1.1B and the MoE in bf16",
    measure=_decode,
    rounds=3,
)
BIGGER = Workload(
    name="bigger-than-memory",
    title="Llama 1.1B bf16 (2.2 GB) in a control group of 1.2 GB: a forward of 4 tokens after the first",
    measure=_bigger,
    rounds=3,
)
BIGGER_MOE = Workload(
    name="bigger-than-memory-moe",
    title="Qwen3-MoE (2.5 GB) in a control group of 0.8 GB: a step of one token after the first",
    measure=_bigger_moe,
    rounds=3,
)
LARGE = Workload(
    name="large",
    title="Llama 3 8B's shapes in bf16 (16 GB): a token after the first, in a control group of 5 GB and without",
    measure=_large,
    rounds=1,
    needs_consent="it writes a checkpoint of 16 GB and reads it several times",
)
