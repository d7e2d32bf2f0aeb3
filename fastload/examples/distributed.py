"""A model that is split over ranks: loaded, run, compared with one process, saved by all ranks, loaded again.

    torchrun --nproc-per-node 4 -m fastload.examples.distributed [DIR] [--out DIR]

Each rank is a process with its part of every layer: on a GPU of its own, over NCCL, where there are enough of them, on
the CPU over gloo otherwise. DIR is a folder with a model of a native family; without it the first rank makes a small
Llama of random weights, which ranks of one machine can read. Without torchrun there is one rank, which has everything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import fastload
from fastload.cli.output import printable
from fastload.errors import FastloadError
from fastload.reports import LoadReport, format_bytes

__all__ = ["main"]

_TIMEOUT = timedelta(minutes=5)
_N_TOKENS = 16
# Sums over ranks are made in another order than in one process.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class Account(NamedTuple):
    """What one rank has to tell of a load: bytes that it read, bytes of the whole model, and the time it took."""

    n_bytes: int
    n_model_bytes: int
    ms: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example on this rank. Returns 0; 1 for an error, or where something is not as in one process."""
    arguments = _parser().parse_args(argv)
    try:
        with _group() as device, _folders(arguments) as (source, out):
            return run(source, out, device)
    except FastloadError as error:
        # torchrun ends the other ranks.
        print(printable(str(error), lines=True), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastload.examples.distributed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", metavar="DIR", nargs="?", help="folder of a model that predicts the next token")
    parser.add_argument("--out", metavar="DIR", help="where to save it (default: nowhere that stays)")
    return parser


def run(source: str, out: str, device: torch.device) -> int:
    """Load, run, compare, save and load again."""
    model, account = _load(source)
    _say(f"{source}, split over {dist.get_world_size()} ranks by {dist.get_backend()}, on {device.type}")
    for rank, told in enumerate(_from_all(account)):
        share = f"{format_bytes(told.n_bytes)} of {format_bytes(told.n_model_bytes)}"
        _say(f"  rank {rank}: read {share} in {told.ms:.0f} ms")
    tokens = torch.arange(_N_TOKENS, device=device).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        logits = model(tokens).logits
    is_right = _compare(logits, source, tokens)
    begun = perf_counter()
    saved = model.save_pretrained(out)
    dist.barrier()
    _say(f"saved by all ranks in {perf_counter() - begun:.2f} s: {', '.join(saved.files)}")
    again, _ = _load(out)
    same = all(_from_all(_same_parts(model, again)))
    _say(f"loaded again, every byte the same: {'yes' if same else 'NO'}")
    return 0 if is_right and same else 1


def _load(folder: str) -> tuple[Any, Account]:
    model: Any = fastload.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", tp_plan="auto")
    report: LoadReport = fastload.report(model)
    n_model_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return model, Account(report.n_bytes, n_model_bytes, sum(report.stages_ms.values()))


def _compare(logits: torch.Tensor, folder: str, tokens: torch.Tensor) -> bool:
    """Whether the first rank, with the whole model, comes to the same; it tells the others."""
    answer: list[bool | None] = [None]
    if dist.get_rank() == 0:
        whole: Any = fastload.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=str(tokens.device))
        with torch.no_grad():
            expected = whole(tokens).logits
        error = (logits - expected).abs().max().item()
        answer[0] = error <= _TOLERANCE.get(logits.dtype, 0.1) * max(1.0, expected.abs().max().item())
        _say(f"a forward of {tokens.numel()} tokens: at most {error:.2g} from one process's logits")
    dist.broadcast_object_list(answer)
    return bool(answer[0])


def _same_parts(model: Any, other: Any) -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(
        name == other_name and torch.equal(_here(tensor).view(torch.uint8), _here(other_tensor).view(torch.uint8))
        for (name, tensor), (other_name, other_tensor) in pairs
    )


def _here(tensor: torch.Tensor) -> torch.Tensor:
    part: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.contiguous().reshape(-1)


@contextmanager
def _group() -> Iterator[torch.device]:
    """The process group that torchrun started, or one of this process alone; this rank's device."""
    rank, n_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, n_local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.device_count() >= n_local:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    store = None if "RANK" in os.environ else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, rank=rank, world_size=n_ranks, store=store, timeout=_TIMEOUT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def _folders(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Where to load from and where to save to, the same for all ranks; what was made for the example is deleted."""
    scratch: list[str | None] = [None]
    if dist.get_rank() == 0:
        scratch[0] = tempfile.mkdtemp(prefix="fastload-example-")
    dist.broadcast_object_list(scratch)
    made = Path(str(scratch[0]))
    source = arguments.folder or str(made / "model")
    try:
        if arguments.folder is None and dist.get_rank() == 0:
            _make_model(source)
        dist.barrier()
        yield source, arguments.out or str(made / "saved")
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(made, ignore_errors=True)


def _make_model(folder: str) -> None:
    torch.manual_seed(0)
    config = fastload.LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    fastload.LlamaForCausalLM(config).save_pretrained(folder)


def _from_all(told: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, told)
    return every


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(printable(text), flush=True)


if __name__ == "__main__":
    sys.exit(main())
