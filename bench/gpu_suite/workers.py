"""A process for each loader: what one of them breaks, leaks or pins is not the others' concern."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from suite.fresh import job_command, job_environment

from gpu_suite.schedule import NotHereError

__all__ = ["PROBE", "RequestFailedError", "Worker", "Workers"]

PROBE = "probe"
"""The worker that loads nothing: it makes checkpoints and measures the machine."""

_LOG_BYTES = 2000
_END_S = 10.0


class RequestFailedError(RuntimeError):
    """A worker answered with an error, died, or did not answer in time."""


class Worker:
    """A process that answers requests, one at a time: ``jobs/gpu.py LOADER DEVICE``.

    Args:
        loader: what it loads with.
        device: where to, such as ``"cuda:0"``.
        import_folders: where it looks for packages first.
    """

    def __init__(self, loader: str, device: str, import_folders: Sequence[Path] = ()) -> None:
        self._name = loader
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        environment = job_environment()
        environment["PYTHONPATH"] = os.pathsep.join([*map(str, import_folders), environment["PYTHONPATH"]])
        self._process = subprocess.Popen(
            job_command("gpu", loader, device),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self.pid = self._process.pid
        self._unread = b""
        self._about: dict[str, Any] = {}

    def about(self, timeout_s: float) -> dict[str, Any]:
        """What the process says of itself once its imports are done. Raises as `ask`."""
        if not self._about:
            self._about = self._heard(monotonic() + timeout_s)
        return self._about

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """What the process answers to a request.

        Raises:
            NotHereError: it cannot be done on this machine.
            RequestFailedError: there is no answer, or it is an error. The process is of no more use.
        """
        end = monotonic() + timeout_s
        self.about(timeout_s)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._no_answer("ended") from None
        return self._heard(end)

    def close(self) -> None:
        """End the process, which has no more to answer."""
        self._kill()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def _kill(self) -> None:
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # one that waits for storage cannot be ended before that answers
            self._process.wait(_END_S)

    def _heard(self, end: float) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._line(end))
        if "not_here" in answer:
            raise NotHereError(answer["not_here"])
        if "error" in answer:
            raise RequestFailedError(answer["error"])
        return answer

    def _line(self, end: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([descriptor], [], [], max(0.0, end - monotonic()))[0]:
                self._kill()
                raise self._no_answer("did not answer in time, and was ended")
            read = os.read(descriptor, 1 << 16)
            if not read:
                raise self._no_answer(f"ended with {self._process.wait()}")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _no_answer(self, what: str) -> RequestFailedError:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_BYTES))
        return RequestFailedError(f"the process of {self._name} {what}\n{self._log.read().decode(errors='replace')}")


class Workers:
    """All processes, by loader. One that failed is replaced when it is asked again.

    Args:
        device: where they load to.
        import_folders: loader -> where its process looks for packages first.
    """

    def __init__(self, device: str, import_folders: dict[str, Sequence[Path]] | None = None) -> None:
        self._device = device
        self._import_folders = import_folders or {}
        self._workers: dict[str, Worker] = {}
        self._missing: dict[str, str] = {}

    def start(self, loader: str) -> Worker:
        """Have a loader's process begin with its imports."""
        if loader not in self._workers:
            self._workers[loader] = Worker(loader, self._device, self._import_folders.get(loader, ()))
        return self._workers[loader]

    def about(self, loader: str, timeout_s: float) -> dict[str, Any]:
        """As `Worker.about`. What is missing once is missing always."""
        if loader in self._missing:
            raise NotHereError(self._missing[loader])
        try:
            return self.start(loader).about(timeout_s)
        except NotHereError as reason:
            self._missing[loader] = str(reason)
            raise
        except BaseException:
            self._end(loader)
            raise

    def ask(self, loader: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """As `Worker.ask`."""
        end = monotonic() + timeout_s
        self.about(loader, timeout_s)
        try:
            return self.start(loader).ask(request, end - monotonic())
        except NotHereError:
            raise
        except BaseException:
            self._end(loader)
            raise

    def close(self) -> None:
        """End all processes."""
        for loader in list(self._workers):
            self._end(loader)

    def _end(self, loader: str) -> None:
        worker = self._workers.pop(loader)
        worker.close()
