"""The steps of ``bench/gpu.py``, in their order: what is made, what is measured, and how long each may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from gpu_suite.checkpoints import FULL, SMALL, Shape
from gpu_suite.loaders import LOADERS
from gpu_suite.marked_tests import run_marked_tests
from gpu_suite.schedule import NotHereError, Records, Step
from gpu_suite.workers import PROBE, Workers

__all__ = ["MAKE", "Plan"]

MAKE, HARDWARE, TESTS = "make", "hardware", "tests"

_TIMES = 3
_SLOW_COLD_S = 12.0
_LONG_REPETITION_S = 60.0
_FLUSH_S = 40.0
_REQUEST_S = 1.5
_TENSOR_S = 1e-4
_WRITTEN_GB_PER_S = 1.0
_COLD_GB_PER_S = 1.0
# A step may take so many times what it was thought to take, and so many seconds in any case.
_PATIENCE, _PATIENCE_S = 4.0, 60.0
# Who converts by itself, and safetensors with torch's own conversion, to compare with.
_CASTING = ("fastload", "transformers", "safetensors", "fastload.hf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured, and by whom.

    Attributes:
        workers: the processes that do it.
        device: where weights go, as torch names it.
        small: tiny checkpoints, that show the script's logic and no speed.
        folder: for the checkpoints.
        loaders: whose turn it is.
        n_repeated: loads of one checkpoint, one after the other.
        tests: the folder with the tests, those among it that need a GPU.
    """

    workers: Workers
    device: str
    small: bool
    folder: Path
    loaders: tuple[str, ...]
    n_repeated: int
    tests: Path

    def steps(self) -> list[Step]:
        """All steps. Of what is measured later, some needs what was measured before."""
        return [
            *(self._make(name, priority) for name, priority in (("dense", 0), ("moe", 0), ("fp32", 1))),
            self._marked_tests(),
            self._of_machine("flush", 1, 15.0, "", timeout_s=_FLUSH_S),
            self._of_machine("link", 0, 5.0, "", small=self.small),
            self._of_machine("page cache", 0, 12.0, "dense", small=self.small),
            *(self._load("dense warm", "dense", loader) for loader in self.loaders),
            *(self._load("moe warm", "moe", loader) for loader in self.loaders),
            *(self._load("fp32 warm", "fp32", loader, 1) for loader in self.loaders if loader == "fastload"),
            *(self._load("fp32 to bf16", "fp32", loader, 1) for loader in self.loaders if loader in _CASTING),
            *(self._first_forward("first forward warm", loader) for loader in self._with_models()),
            self._repeat(),
            self._of_machine("storage", 1, 22.0, "dense"),
            self._make("less", 1),
            *(self._load("cold", None, loader, 1) for loader in self.loaders),
            *(self._first_forward("first forward cold", loader) for loader in self._with_models()),
        ]

    def _with_models(self) -> list[str]:
        return [loader for loader in self.loaders if LOADERS[loader].gives_model]

    def _shape(self, name: str) -> Shape:
        return (SMALL if self.small else FULL)[name]

    def _step(
        self,
        group: str,
        row: str,
        priority: int,
        estimate_s: Callable[[Records], float],
        worker: str,
        request: Callable[[Records], dict[str, Any]],
    ) -> Step:
        """A step that is one request to one process. What the request says of the content stands in the result."""

        def run(records: Records, left_s: float) -> dict[str, Any]:
            asked = request(records)
            content = asked.pop("content", None)
            begun = monotonic()
            about = self.workers.about(worker, left_s)  # imports are no part of it
            left_s -= monotonic() - begun
            timeout_s = min(left_s, max(_PATIENCE_S, _PATIENCE * estimate_s(records)))
            result = self.workers.ask(worker, asked, timeout_s)
            return result if content is None else {"content": content, "version": about["version"], **result}

        return Step(group=group, row=row, priority=priority, estimate_s=estimate_s, run=run)

    def _make(self, name: str, priority: int) -> Step:
        def request(records: Records) -> dict[str, Any]:
            if name == "less" and self._cold_checkpoint(records) != name:
                raise NotHereError("not needed: the storage is fast enough for the large one")
            return {"do": "make", "folder": str(self.folder / name), "shape": name, "small": self.small}

        seconds = self._shape(name).n_bytes / 1e9 / _WRITTEN_GB_PER_S
        return self._step(MAKE, name, priority, lambda _: _REQUEST_S + seconds, PROBE, request)

    def _of_machine(self, what: str, priority: int, estimate_s: float, checkpoint: str, **options: Any) -> Step:
        def request(records: Records) -> dict[str, Any]:
            folder = _made(records, checkpoint) if checkpoint else ""
            return {"do": what, **({"folder": folder} if folder else {}), **options}

        return self._step(HARDWARE, what, priority, lambda _: estimate_s, PROBE, request)

    def _load(self, group: str, checkpoint: str | None, loader: str, less_important: int = 0) -> Step:
        """Loads of one checkpoint; None for that which suits the storage, dropped from the page cache before."""
        cold, to_bfloat16 = checkpoint is None, group == "fp32 to bf16"
        times = 1 if cold else _TIMES

        def estimate_s(records: Records) -> float:
            shape = self._shape(checkpoint or self._cold_checkpoint(records))
            rate = min(LOADERS[loader].gb_per_s, _cold_rate(records)) if cold else LOADERS[loader].gb_per_s
            return _REQUEST_S + times * (shape.n_bytes / 1e9 / rate + shape.n_tensors * _TENSOR_S)

        def request(records: Records) -> dict[str, Any]:
            name = checkpoint or self._cold_checkpoint(records)
            asked = {"do": "load", "folder": _made(records, name), "to_bfloat16": to_bfloat16}
            return asked | {"times": times, "cold": cold, "content": group if to_bfloat16 else name}

        return self._step(group, loader, LOADERS[loader].priority + less_important, estimate_s, loader, request)

    def _first_forward(self, group: str, loader: str) -> Step:
        cold, streams = group.endswith("cold"), LOADERS[loader].streams
        times = 1 if cold else _TIMES

        def estimate_s(records: Records) -> float:
            n_gb = self._shape(self._cold_checkpoint(records) if cold else "dense").n_bytes / 1e9
            rate = min(LOADERS[loader].gb_per_s, _cold_rate(records)) if cold else LOADERS[loader].gb_per_s
            return _REQUEST_S + n_gb / LOADERS[loader].gb_per_s + times * (1 + streams) * n_gb / rate

        def request(records: Records) -> dict[str, Any]:
            name = self._cold_checkpoint(records) if cold else "dense"
            asked = {"do": "first forward", "folder": _made(records, name), "content": name}
            return asked | {"times": times, "cold": cold, "stream": streams}

        # What loads slower than fastload with and without streaming tells less than the loads alone.
        priority = LOADERS[loader].priority + cold + (loader != "fastload")
        return self._step(group, loader, priority, estimate_s, loader, request)

    def _repeat(self) -> Step:
        def estimate_s(records: Records) -> float:
            return _REQUEST_S + self._repeated(records)[1]

        def request(records: Records) -> dict[str, Any]:
            return {"do": "repeat", "folder": _made(records, self._repeated(records)[0]), "times": self.n_repeated}

        return self._step("repeated loads", "fastload", 1, estimate_s, "fastload", request)

    def _repeated(self, records: Records) -> tuple[str, float]:
        """The largest checkpoint whose loads take less than a minute, or else the quickest; and their seconds."""
        seconds = {
            name: median(loaded.result["seconds"]) * self.n_repeated
            for name in ("dense", "moe", "fp32")
            if (loaded := records.get((f"{name} warm", "fastload"))) is not None and loaded.status == "done"
        }
        if not seconds:
            gb_per_s = LOADERS["fastload"].gb_per_s
            return "dense", self._shape("dense").n_bytes / 1e9 / gb_per_s * self.n_repeated
        quickest = min(seconds, key=seconds.__getitem__)
        name = next((name for name in seconds if seconds[name] <= _LONG_REPETITION_S), quickest)
        return name, seconds[name]

    def _marked_tests(self) -> Step:
        def run(_: Records, left_s: float) -> dict[str, Any]:
            if self.device == "cpu":
                raise NotHereError("they need a CUDA device")
            return run_marked_tests(self.tests, min(left_s, 2 * _PATIENCE_S))

        return Step(group=TESTS, row="pytest -m gpu", priority=0, estimate_s=lambda _: 30.0, run=run)

    def _cold_checkpoint(self, records: Records) -> str:
        """The large one, or where the storage would take too long with it the small one."""
        return "dense" if self._shape("dense").n_bytes / 1e9 / _cold_rate(records) <= _SLOW_COLD_S else "less"


def _cold_rate(records: Records) -> float:
    """What the storage gives, in GB/s; a guess until it was measured."""
    measured = records.get((HARDWARE, "storage"))
    return float(measured.result["best_gb_per_s"]) if measured and measured.status == "done" else _COLD_GB_PER_S


def _made(records: Records, name: str) -> str:
    """The folder of a checkpoint. NotHereError where it was not made."""
    made = records.get((MAKE, name))
    if made is None or made.status != "done":
        raise NotHereError(f"there is no checkpoint {name}")
    return str(made.result["folder"])
