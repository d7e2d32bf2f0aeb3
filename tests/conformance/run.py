"""Holds fastload to transformers on every model class that an Auto mapping names, and prints how each family fared.

python -m tests.conformance.run [--family X] [--class Y] [--sample N] [--jobs N] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import resource
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers

from tests.conformance.case import DIFFERS, SKIPPED, Case, Result
from tests.conformance.classes import Reachable, reachable_classes
from tests.conformance.loading import LOADERS, Loader
from tests.conformance.report import report

SECONDS_A_CLASS = 120.0
MEMORY_N_BYTES = 8 << 30
# transformers is imported once: a process of its own for each family would spend most of its time on that.
FORK = multiprocessing.get_context("fork")


class Worker:
    """A process that runs the classes of one family; a class at which it dies or hangs costs only itself."""

    def __init__(self, classes: Sequence[Reachable], loader: Loader, scratch: Path, seconds: float) -> None:
        self.classes, self.loader, self.scratch, self.seconds = deque(classes), loader, scratch, seconds
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=_work, args=(list(self.classes), self.loader, self.scratch, theirs))
        self.process.start()
        theirs.close()
        self.heard = time.monotonic()

    def results(self) -> Iterator[Result]:
        """What has come since the last call."""
        try:
            while self.pipe.poll():
                yield self.pipe.recv()
                self.classes.popleft()
                self.heard = time.monotonic()
        except EOFError:
            self.process.join()
            yield from self._lost(f"the process ended with code {self.process.exitcode}")
        if time.monotonic() - self.heard > self.seconds:
            self.stop()
            yield from self._lost(f"took longer than {self.seconds:.0f} s")

    def _lost(self, reason: str) -> Iterator[Result]:
        """The class that was being run, if any; the others go on in a new process."""
        if not self.classes:
            return
        lost = self.classes.popleft()
        yield Result(lost.family, lost.class_name, SKIPPED, reason)
        if self.classes:
            self._start()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _work(classes: list[Reachable], loader: Loader, scratch: Path, pipe: multiprocessing.connection.Connection) -> None:
    """In the child: one result for each class."""
    torch.set_num_threads(1)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_N_BYTES,) * 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for i, reachable in enumerate(classes):
        pipe.send(Case(reachable, loader, scratch / reachable.class_name, other_first=i % 2 == 1).run())


def run(
    classes: Sequence[Reachable], loader: Loader, n_jobs: int, seconds_a_class: float = SECONDS_A_CLASS
) -> Iterator[Result]:
    """Every class once, in the order in which they are ready. No file and no process stays."""
    families: dict[str, list[Reachable]] = {}
    for reachable in classes:
        families.setdefault(reachable.family, []).append(reachable)
    waiting = deque(sorted(families.values(), key=len, reverse=True))
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="conformance-") as scratch:
        try:
            while waiting or workers:
                while waiting and len(workers) < n_jobs:
                    workers.append(Worker(waiting.popleft(), loader, Path(scratch), seconds_a_class))
                multiprocessing.connection.wait([worker.pipe for worker in workers], timeout=1.0)
                for worker in workers:
                    yield from worker.results()
                for worker in [worker for worker in workers if not worker.classes]:
                    worker.process.join()
                    workers.remove(worker)
        finally:
            for worker in workers:
                worker.stop()


def chosen(families: Sequence[str], class_names: Sequence[str], n_sample: int) -> list[Reachable]:
    """The classes of these families and of these names, or all; a sample is spread evenly over them."""
    classes = [
        reachable
        for reachable in reachable_classes()
        if (not families or reachable.family in families) and (not class_names or reachable.class_name in class_names)
    ]
    n_sample = min(n_sample or len(classes), len(classes))
    return [classes[i * len(classes) // n_sample] for i in range(n_sample)]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if any class differs on which transformers passes."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.run", description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", default=[], help="a package under transformers.models; repeatable")
    parser.add_argument("--class", action="append", default=[], dest="names", help="a model class; repeatable")
    parser.add_argument("--sample", type=int, default=0, help="so many classes, spread over all families")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--loader", choices=sorted(LOADERS), default="fastload", help="what is held to stock")
    parser.add_argument("--json", type=Path, help="where to write every result")
    arguments = parser.parse_args(argv)
    begin, results = time.monotonic(), []
    for result in run(
        chosen(arguments.family, arguments.names, arguments.sample), LOADERS[arguments.loader], arguments.jobs
    ):
        results.append(result)
        sys.stderr.write(f"{result.status:12s} {result.family}.{result.class_name} {result.reason[:80]}\n")
    sys.stdout.write(report(results, time.monotonic() - begin))
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")
    return int(any(result.status == DIFFERS for result in results))


if __name__ == "__main__":
    sys.exit(main())
