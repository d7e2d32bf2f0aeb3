"""One class through every variant: written by transformers, in another dtype, with gaps, saved by fastload, as .bin."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.conformance.classes import Reachable
from tests.conformance.compare import ModelState, differences, mended, model_state
from tests.conformance.loading import (
    SEED,
    Loader,
    Outcome,
    Stock,
    make_gaps,
    observe,
    outcome_differences,
    stored,
    told,
    unwritten_memory_shown,
)
from tests.conformance.tiny import NotBuiltError, build

PASSED, DIFFERS, STOCK_FAILS, SKIPPED = "passed", "differs", "stock fails", "skipped"
STOCK = Stock()
MOST_LINES = 30
N_SHARDS = 3


@dataclass
class Result:
    """How one class fared.

    Attributes:
        reason: why it was skipped, or how transformers itself failed.
        differences: lines by variant.
        lossy: what transformers does not bring back as it was built.
        mended: computed tensors that transformers leaves without values and the other loader does not.
        unsteady: what transformers does not write, or not twice the same.
        n_converters: how many operations turn stored tensors into the model's.
        fast, handed_over: loads and saves that fastload did, and others by their reason.
        stock_seconds, other_seconds: of the processor, for loads alone, the same ones by both.
    """

    family: str
    class_name: str
    status: str = PASSED
    reason: str = ""
    differences: dict[str, list[str]] = field(default_factory=dict)
    lossy: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    unsteady: list[str] = field(default_factory=list)
    n_bytes: int = 0
    n_converters: int = 0
    fast: int = 0
    handed_over: dict[str, int] = field(default_factory=dict)
    stock_seconds: float = 0.0
    other_seconds: float = 0.0
    wall_seconds: float = 0.0


class StockFailsError(Exception):
    """transformers itself cannot save or load it."""


class Case:
    """One class and its folders; `other` is the loader that is held to transformers' own."""

    def __init__(self, reachable: Reachable, other: Loader, scratch: Path, other_first: bool = False) -> None:
        self.reachable, self.other, self.scratch, self.other_first = reachable, other, scratch, other_first
        self.result = Result(reachable.family, reachable.class_name)

    def run(self) -> Result:
        """All variants. Whatever the class does is a result; the folders are gone afterwards."""
        result, begin = self.result, time.perf_counter()
        fast, handed_over = self.other.counts()
        try:
            self._variants()
        except NotBuiltError as error:
            result.status, result.reason = SKIPPED, str(error)
        except StockFailsError as error:
            result.status, result.reason = STOCK_FAILS, str(error)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            gc.collect()
        if result.differences:
            result.status = DIFFERS
        fast_now, handed_over_now = self.other.counts()
        result.fast = fast_now - fast
        new = {reason: count - handed_over.get(reason, 0) for reason, count in handed_over_now.items()}
        result.handed_over = {reason: count for reason, count in new.items() if count}
        result.wall_seconds = time.perf_counter() - begin
        return result

    def _variants(self) -> None:
        model = build(self._model_class(), SEED)
        self.result.n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        written = self.scratch / "written"
        self._stock("save_pretrained", lambda: model.save_pretrained(written))
        self.built = model_state(model)
        expected, found = self._compare("written by transformers", written)
        if expected.state is None:
            raise StockFailsError(expected.error + ("" if found.error else " (the other did not fail)"))
        self.result.lossy = _lossy(self.built, expected.state)
        self.result.n_converters = sum("Converter" in c for c in expected.state.weight_conversions)
        self._compare("in bfloat16", written, dtype=torch.bfloat16)
        gaps = self.scratch / "gaps"
        make_gaps(written, gaps, set(expected.state.tensors))
        self._compare("with gaps", gaps, ignore_mismatched_sizes=True)
        if found.model is not None:
            self._saved(expected, found)

    def _model_class(self) -> type:
        try:
            return self.reachable.model_class
        except (AttributeError, ImportError) as error:
            raise NotBuiltError(told(error, self.scratch)) from error

    def _saved(self, expected: Outcome, found: Outcome) -> None:
        """Written anew from the models that the loaders gave: the same files, and the same models from them."""
        most = max(1000, self.result.n_bytes // N_SHARDS)
        reference, sharded, pickled = (self.scratch / name for name in ("reference", "sharded", "pickled"))
        self._stock("save_pretrained of a loaded model", lambda: STOCK.save(expected.model, reference, most))
        wanted = stored(reference)
        for variant, folder, save in (
            ("saved", sharded, lambda: self.other.save(found.model, sharded, most)),
            ("saved as .bin", pickled, lambda: self.other.save_bin(found.model, pickled)),
        ):
            try:
                save()
            except Exception as error:  # noqa: BLE001
                self._note(variant, [f"save raised {told(error, self.scratch)}"])
                continue
            self._note(f"{variant}, files", differences(wanted, stored(folder)))
            self._compare(variant, folder)

    def _compare(self, variant: str, folder: Path, **options: object) -> tuple[Outcome, Outcome]:
        """Both loads of a folder, taking turns at being the first; notes how they differ."""
        model_class = self._model_class()
        loaders = (self.other, STOCK) if self.other_first else (STOCK, self.other)
        outcomes = [observe(loader, model_class, folder, **options) for loader in loaders]
        found, expected = outcomes if self.other_first else reversed(outcomes)
        self.other_first = not self.other_first
        self.result.stock_seconds += expected.seconds
        self.result.other_seconds += found.seconds
        lines = outcome_differences(expected, found)
        if lines and expected.state and found.state:
            right = mended(self.built, expected.state, found.state)
            self.result.mended = sorted({*self.result.mended, *right})
            with unwritten_memory_shown():
                again = observe(STOCK, model_class, folder, **options)
            unsteady = [line for line in outcome_differences(expected, again) if not _is_of(line, right)]
            self.result.unsteady = sorted({*self.result.unsteady, *unsteady})[:MOST_LINES]
            lines = [line for line in lines if not _is_of(line, [*right, *map(_subject, unsteady)])]
        self._note(variant, lines)
        return expected, found

    def _stock(self, what: str, act: Callable[[], None]) -> None:
        """Do what transformers must be able to do before anything can be held to it."""
        try:
            act()
        except Exception as error:
            raise StockFailsError(f"{what}: {told(error, self.scratch)}") from error

    def _note(self, variant: str, lines: list[str]) -> None:
        if lines:
            more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
            self.result.differences[variant] = lines[:MOST_LINES] + more


def _lossy(built: ModelState, loaded: ModelState) -> list[str]:
    lines = [line for line in differences(built, loaded) if line.startswith(("tensors:", "same_objects:"))]
    return [line for line in lines if "requires_grad" not in line][:MOST_LINES]


def _subject(line: str) -> str:
    """What a line is about: "tensors: NAME" or the like."""
    return ": ".join(line.split(": ")[1:2])


def _is_of(line: str, names: Iterable[str]) -> bool:
    return _subject(line) in names
