"""Fuzzes the readers: ``python -m tests.fuzz [TARGET ...] [--runs N]``, as ``make fuzz`` does.

Each target runs in a process of its own, from the corpus beside this file and from valid files made anew. A crash, an
exception that is no refusal, an input that takes more than a second or a process of more than a gigabyte is a finding:
the input is kept in the folder that is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.corpus import read_corpus, write_corpus
from tests.fuzz.seeds import WORDS, seeds
from tests.fuzz.targets import TARGETS

_RUNS = 200_000  # of each target: 1.2 million together
_MAX_INPUT_BYTES = 4096


class Outcome(NamedTuple):
    """What fuzzing one target came to."""

    target: str
    n_runs: int
    seconds: float
    peak_mb: int
    found: str | None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", default=[], help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--runs", type=int, default=_RUNS, help="executions of each target")
    parser.add_argument("--keep", action="store_true", help="rewrite the corpus with what gave new coverage")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    findings = Path(tempfile.mkdtemp(prefix="fastload-fuzz-"))
    outcomes = []
    print(f"{'target':<20} {'executions':>12} {'seconds':>8} {'peak MB':>8}  finding")
    for target in arguments.targets or TARGETS:
        outcome = _fuzz(target, arguments.runs, findings, keep=arguments.keep)
        outcomes.append(outcome)
        shown = f"{outcome.n_runs:>12,} {outcome.seconds:>8.0f} {outcome.peak_mb:>8}"
        print(f"{target:<20} {shown}  {outcome.found or 'none'}", flush=True)
    print(f"{'all':<20} {sum(outcome.n_runs for outcome in outcomes):>12,}")
    if any(outcome.found for outcome in outcomes):
        return 1
    findings.rmdir()
    return 0


def _fuzz(target: str, n_runs: int, findings: Path, *, keep: bool) -> Outcome:
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        grown, valid, kept, words = (folder / name for name in ("grown", "valid", "kept", "words"))
        grown.mkdir()
        for where, inputs in ((valid, seeds(target)), (kept, read_corpus(target))):
            where.mkdir()
            for number, data in enumerate(inputs):
                (where / str(number)).write_bytes(data)
        words.write_text("".join(f'"{_quoted(word)}"\n' for word in WORDS))
        options = {
            "runs": n_runs,
            "max_len": _MAX_INPUT_BYTES,
            "mutate_depth": 2,
            "timeout": 30,  # of the clock, for what hangs; running.py looks at the processor's time
            "rss_limit_mb": 1024,
            "dict": words,
            "print_final_stats": 1,
            "artifact_prefix": f"{findings}/{target}-",
        }
        command = [sys.executable, "-m", "tests.fuzz.running", target, str(valid)]
        command += [f"-{name}={value}" for name, value in options.items()]
        done = subprocess.run(
            [*command, str(grown), str(valid), str(kept)], capture_output=True, text=True, errors="replace", check=False
        )
        if keep and done.returncode == 0:
            write_corpus(target, [*read_corpus(target), *(path.read_bytes() for path in sorted(grown.iterdir()))])
    stats = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr)}
    found = None
    if done.returncode:
        inputs_kept = ", ".join(str(path) for path in findings.glob(f"{target}-*"))
        error = re.search(r"=== Uncaught Python exception: ===\n(.*)", done.stdout + done.stderr)
        found = f"{error[1] if error else done.stderr[-500:]} ({inputs_kept or 'no input kept'})"
    n_done = stats.get("number_of_executed_units", 0)
    if found is None and n_done < n_runs:
        found = f"it ended early: {done.stderr[-500:]}"
    seconds = time.perf_counter() - begin
    return Outcome(target, n_done, seconds, stats.get("peak_rss_mb", 0), found)


def _quoted(word: str) -> str:
    return "".join(char if char.isalnum() else f"\\x{ord(char):02x}" for char in word)


if __name__ == "__main__":
    sys.exit(main())
