"""Fresh processes: one job, one interpreter, its measurements as a line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

__all__ = [
    "JobFailedError",
    "Worker",
    "finish",
    "job_command",
    "job_environment",
    "run_job",
    "seconds_of_process",
    "started",
]

_BENCH = Path(__file__).resolve().parents[1]
_STARTED = "FASTLOAD_BENCH_STARTED"
_SETTINGS = {
    # The fastload that is measured is the one that these benchmarks lie beside, whatever else is installed.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(_BENCH.parent), str(_BENCH), os.environ.get("PYTHONPATH")])),
    # Bytecode is kept, as it is for a user, even where this process was told not to: its own code compiled anew in
    # every process would be charged to the loader. (An empty value is as none.)
    "PYTHONDONTWRITEBYTECODE": "",
    # Local folders only, and no progress bars: it spares every loader what has nothing to do with loading.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class JobFailedError(RuntimeError):
    """A job ended with an error, or without its line of JSON."""


def job_command(job: str, *arguments: str) -> list[str]:
    """The command that runs ``jobs/JOB.py`` in an interpreter as this one."""
    return [sys.executable, str(_BENCH / "jobs" / f"{job}.py"), *arguments]


def job_environment() -> dict[str, str]:
    """The environment that all jobs run in: this checkout's fastload, local files, no progress bars."""
    return os.environ | _SETTINGS


def run_job(job: str, *arguments: str) -> dict[str, Any]:
    """Run ``jobs/JOB.py`` in a fresh interpreter and return what it passed to `finish`.

    The job's clock begins here, before the process is made: time.monotonic() is one clock for all processes of a
    machine.
    """
    environment = job_environment() | {_STARTED: repr(monotonic())}
    done = subprocess.run(job_command(job, *arguments), env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise JobFailedError(f"{job} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


class Worker:
    """A job that goes on step by step: it says something, a line of JSON, and waits until it is told to go on."""

    def __init__(self, job: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            job_command(job, *arguments),
            env=job_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def heard(self) -> Any:
        """What the job says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise JobFailedError(f"a worker ended with {self._process.wait()}")
        return json.loads(line)

    def go_on(self) -> None:
        """Let it take the next step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Its input ends, and so does it."""
        self._process.communicate()


def started() -> float:
    """In a job: the moment, on time.monotonic()'s clock, when its process was asked for."""
    return float(os.environ[_STARTED])


def finish(**measured: Any) -> None:
    """In a job: hand back what was measured."""
    print(json.dumps(measured))


def seconds_of_process(*arguments: str) -> float:
    """Wall time of ``python ARGUMENTS`` from before it is made until it has ended. It must end well."""
    command, environment = [sys.executable, *arguments], job_environment()
    begun = monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = monotonic() - begun
    if done.returncode:
        raise JobFailedError(f"python {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return seconds
