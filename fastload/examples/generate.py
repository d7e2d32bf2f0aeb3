"""A text from a prompt, as it is made, and what it took.

    python -m fastload.examples.generate DIR --prompt "Once upon a time" [--max-new-tokens 64]

DIR is a folder with a model that predicts the next token and its tokenizer.json. How it chooses tokens is what its
generation_config.json says, unless --temperature is given; a temperature of 0 always takes the likeliest.

    --memory 2GB    hold no more than this of the weights in memory, and read the others for each token
    --stream        begin before all weights are there
    --lazy          read a block of weights when it is first used
    --compare       let transformers go on with the same tokens, in a fresh process, and compare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import fastload
from fastload.cli.measuring import Job, run_job
from fastload.cli.output import printable
from fastload.cli.usage import peak_bytes, read_bytes, seconds_since_start
from fastload.errors import FastloadError, OptionError
from fastload.examples.tokenizing import as_chat, read_tokenizer
from fastload.models.generation.text import TextPieces
from fastload.reports import format_bytes
from fastload.storage.memory import private_bytes

__all__ = ["main"]

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example. Returns 0; 1 for an error, or texts that differ; 130 after a Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return run(arguments)
    except FastloadError as error:
        print(printable(str(error), lines=True), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastload.examples.generate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", metavar="DIR", help="folder of a model and its tokenizer.json")
    parser.add_argument("--prompt", required=True, help="what the text begins with")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--temperature", metavar="T", type=float, help="draw tokens; 0 for the likeliest")
    parser.add_argument("--top-k", metavar="K", type=int, help="draw from the K likeliest")
    parser.add_argument("--top-p", metavar="P", type=float, help="draw from the likeliest that have the share P")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the tokens drawn (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="type of the weights, such as bfloat16 (default: as they are)")
    parser.add_argument("--device", help="where to run, such as cuda (default: cpu)")
    parser.add_argument("--memory", metavar="SIZE", help="most memory for weights, such as 2GB")
    parser.add_argument("--stream", action="store_true", help="begin before all weights are there")
    parser.add_argument("--lazy", action="store_true", help="read weights when they are first used")
    parser.add_argument("--compare", action="store_true", help="also run transformers, and compare")
    return parser


@dataclass
class Account:
    """What a text took, in seconds since the process began, and bytes.

    Attributes:
        at_model: the model was loaded.
        at_tokens: each token was there.
        tokens: the new ones.
    """

    at_model: float | None = None
    at_tokens: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    private_bytes: int | None = None
    peak_bytes: int | None = None
    read_bytes: int | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """After the first token, which the prompt has to be read for."""
        if len(self.at_tokens) < 2:
            return None
        return (len(self.at_tokens) - 1) / (self.at_tokens[-1] - self.at_tokens[0])


def run(arguments: argparse.Namespace) -> int:
    """Load, go on with the prompt, print; and compare if that is asked for."""
    begun = monotonic() - (seconds_since_start() or 0.0)
    tokenizer = read_tokenizer(arguments.folder)
    prompt = as_chat(arguments.folder, arguments.prompt) if arguments.chat else arguments.prompt
    # A template writes the tokens that begin a text itself.
    tokens = tokenizer.encode(prompt, add_special_tokens=not arguments.chat).ids
    if not tokens:
        raise OptionError("the prompt has no tokens", key="--prompt", found=repr(arguments.prompt))
    account = Account()
    printer = Printer(tokenizer, account, begun, arguments.prompt + ("\n\n" if arguments.chat else ""))
    try:
        _generate(arguments, tokens, account, printer, begun)
    finally:
        # What there is of the text and its account is worth as much after a Ctrl-C.
        account.private_bytes, account.peak_bytes, account.read_bytes = private_bytes(), peak_bytes(), read_bytes()
        if account.tokens:
            print(f"\n\n{_table({'fastload': account})}")
    return _compare(arguments, tokens, account, tokenizer) if arguments.compare else 0


def _generate(
    arguments: argparse.Namespace, tokens: list[int], account: Account, printer: Printer, begun: float
) -> None:
    import torch

    asked = {"memory_budget": arguments.memory, "device_map": arguments.device}
    asked |= {"stream": arguments.stream or None, "lazy": arguments.lazy or None}
    options = {name: value for name, value in asked.items() if value is not None}
    model: Any = fastload.AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=arguments.dtype, **options)
    account.at_model = monotonic() - begun
    torch.manual_seed(arguments.seed)
    # Weights that come later are nowhere yet.
    prompt = torch.tensor([tokens], device="cpu" if model.device.type == "meta" else model.device)
    model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=printer, **_choices(arguments))


def _choices(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of generate, of fastload's models and of transformers' alike."""
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    if arguments.temperature == 0:
        return {**options, "do_sample": False}
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    given = {name: value for name, value in sampling.items() if value is not None}
    return {**options, **given, "do_sample": True} if given else options


class Printer:
    """A streamer: prints the text that tokens make, as it comes, and notes when it came."""

    def __init__(self, tokenizer: Any, account: Account, begun: float, prompt: str) -> None:
        self._pieces = TextPieces(tokenizer)
        self._account = account
        self._begun = begun
        self._prompt = prompt

    def put(self, value: Any) -> None:
        """The prompt's tokens first, then one token after the other."""
        if self._prompt:
            print(_shown(self._prompt), end="", flush=True)
            self._prompt = ""
            return
        self._account.at_tokens.append(monotonic() - self._begun)
        (token,) = value.tolist()
        self._account.tokens.append(token)
        print(_shown(self._pieces.put(token)), end="", flush=True)

    def end(self) -> None:
        """What was held back."""
        print(_shown(self._pieces.end()), end="", flush=True)


def _shown(text: str) -> str:
    """The text without what a terminal would obey, but for tabs and new lines."""
    return "\t".join(printable(part, lines=True) for part in text.split("\t"))


def _compare(arguments: argparse.Namespace, tokens: list[int], ours: Account, tokenizer: Any) -> int:
    """Have transformers go on with the same tokens. Returns 1 if it makes others."""
    print("\ntransformers, in a process of its own:\n", flush=True)
    load_options = {"dtype": arguments.dtype, "device_map": arguments.device}
    job = Job(
        library="transformers",
        auto_class="AutoModelForCausalLM",
        folder=arguments.folder,
        load_options={name: value for name, value in load_options.items() if value is not None},
        tokens=tuple(tokens),
        generate_options=_choices(arguments),
        seed=arguments.seed,
    )
    found = run_job(job)
    theirs = Account(
        at_model=found["at_model"],
        at_tokens=found["at_tokens"],
        tokens=found["output"],
        private_bytes=found["private_bytes"],
        peak_bytes=found["peak_bytes"],
        read_bytes=found["read_bytes"],
    )
    text = tokenizer.decode(theirs.tokens, skip_special_tokens=True)
    print(f"{_shown(arguments.prompt + text)}\n\n{_table({'fastload': ours, 'transformers': theirs})}\n")
    n_same = next(
        (n for n, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=False)) if a != b),
        min(len(ours.tokens), len(theirs.tokens)),
    )
    if ours.tokens == theirs.tokens:
        print(f"all {n_same} tokens are the same")
        return 0
    print(f"the first {n_same} tokens are the same, and then they differ")
    return 1


def _table(accounts: dict[str, Account]) -> str:
    """A column for each account."""
    rows = {
        "": list(accounts),
        "model loaded after": [_seconds(account.at_model) for account in accounts.values()],
        "first token after": [_seconds(next(iter(account.at_tokens), None)) for account in accounts.values()],
        "tokens": [str(len(account.tokens)) for account in accounts.values()],
        "tokens per second": [
            "" if account.tokens_per_s is None else f"{account.tokens_per_s:.1f}" for account in accounts.values()
        ],
        "private memory": [_bytes(account.private_bytes) for account in accounts.values()],
        "peak memory": [_bytes(account.peak_bytes) for account in accounts.values()],
        "read from disk": [_bytes(account.read_bytes) for account in accounts.values()],
    }
    lines = [f"{title:<20}" + "".join(f"{cell:>14}" for cell in cells) for title, cells in rows.items()]
    return "\n".join(line.rstrip() for line in lines)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def _bytes(value: int | None) -> str:
    return "" if value is None else format_bytes(value)


if __name__ == "__main__":
    sys.exit(main())
