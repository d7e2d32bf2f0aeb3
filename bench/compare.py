"""fastload and its peers, side by side: ``python bench/compare.py WORKLOAD...``.

Prints a table for each workload and ends stdout with one JSON document: the workload's, or a list of them if several
were asked for. Loaders take turns in every round; what they returned is compared after the clock has stopped, and a
difference is an error. A missed target is shown, and is not an error: times depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite.fingerprint import ResultsDifferError
from suite.fresh import JobFailedError
from suite.outcome import Workload
from suite.page import update_page
from suite.plotting import MissingMatplotlibError, plot
from suite.table import render
from workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "README.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the workloads that are named. Returns the exit status."""
    options = _parser().parse_args(arguments)
    documents = []
    for name in options.workloads:
        if (reason := WORKLOADS[name].needs_consent) and not (options.large or options.kept):
            print(f"{name}: left out, {reason}; --large allows it", file=sys.stderr)
            return 2
        try:
            document = _kept(name) if options.kept else _measured(WORKLOADS[name], options.rounds)
        except (ResultsDifferError, JobFailedError, FileNotFoundError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        documents.append(document)
        print(render(document, WORKLOADS[name].title), end="\n\n", file=sys.stderr if options.json else sys.stdout)
        if options.save:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(_as_json(document) + "\n")
            update_page(PAGE, RESULTS, WORKLOADS.values())
    if options.plot:
        try:
            plot(documents, options.plot)
        except MissingMatplotlibError as error:
            print(error, file=sys.stderr)
            return 1
    print(_as_json(documents[0] if len(documents) == 1 else documents))
    return 0


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<12} {workload.title}" for name, workload in WORKLOADS.items())
    parser = argparse.ArgumentParser(
        description="fastload and its peers, side by side.",
        epilog=f"workloads:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workloads", nargs="+", choices=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--rounds", type=_positive, help="rounds of each workload (otherwise its own number)")
    parser.add_argument("--json", action="store_true", help="only the document on stdout, the tables on stderr")
    parser.add_argument(
        "--save", action="store_true", help="keep the documents in bench/results/, the tables in README.md"
    )
    parser.add_argument("--large", action="store_true", help="allow workloads that need tens of gigabytes of disk")
    parser.add_argument("--kept", action="store_true", help="measure nothing: take the documents of bench/results/")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the documents of this run")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least one round")
    return number


def _measured(workload: Workload, rounds: int | None) -> dict[str, Any]:
    return workload.measure(rounds or workload.rounds).document(workload.name)


def _kept(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def _as_json(document: object) -> str:
    """Indented, but a list of numbers on one line."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\[[-\d.e,\s]*\]", lambda numbers: " ".join(numbers[0].split()), text)


if __name__ == "__main__":
    sys.exit(main())
