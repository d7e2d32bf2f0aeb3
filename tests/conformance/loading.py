"""Loads and saves under observation: by transformers' own code, and by fastload."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils.logging import warning_once

from fastload.hf import enabled, save_pretrained, stats
from tests.conformance.compare import ModelState, TensorState, differences, model_state, tensor_state

SEED = 20


class Loader(Protocol):
    """One way to load and save transformers' models."""

    name: str

    def load(self, model_class: type[PreTrainedModel], folder: Path, **options: Any) -> Any: ...

    def save(self, model: PreTrainedModel, folder: Path, max_shard_size: int) -> None: ...

    def save_bin(self, model: PreTrainedModel, folder: Path) -> None: ...

    def counts(self) -> tuple[int, Mapping[str, int]]:
        """Loads and saves that were fast so far, and why others were handed over: reason -> how often."""


class Stock:
    """transformers alone; against itself it proves the comparison."""

    name = "stock"

    def load(self, model_class: type[PreTrainedModel], folder: Path, **options: Any) -> Any:
        return model_class.from_pretrained(folder, **options)

    def save(self, model: PreTrainedModel, folder: Path, max_shard_size: int) -> None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)

    def save_bin(self, model: PreTrainedModel, folder: Path) -> None:
        """transformers 5 writes no .bin: the tensors of its safetensors file, in a pickle."""
        model.save_pretrained(folder)
        weights = folder / "model.safetensors"
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()

    def counts(self) -> tuple[int, Mapping[str, int]]:
        return 0, {}


class Fastload:
    """transformers with fastload switched on."""

    name = "fastload"

    def load(self, model_class: type[PreTrainedModel], folder: Path, **options: Any) -> Any:
        with enabled():
            return model_class.from_pretrained(folder, **options)

    def save(self, model: PreTrainedModel, folder: Path, max_shard_size: int) -> None:
        save_pretrained(model, folder, max_shard_size=max_shard_size)

    def save_bin(self, model: PreTrainedModel, folder: Path) -> None:
        save_pretrained(model, folder, safe_serialization=False)

    def counts(self) -> tuple[int, Mapping[str, int]]:
        counted = stats()
        return counted.fast_loads + counted.fast_saves, counted.reasons


LOADERS: Mapping[str, Loader] = {loader.name: loader for loader in (Stock(), Fastload())}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one load did: the state of its model, and all that it said.

    `seconds` are the processor's, so that what else the machine does counts for neither loader.
    """

    state: ModelState | None
    info: Mapping[str, str]
    messages: Mapping[str, int]
    random_state: str
    error: str = ""
    seconds: float = field(default=0.0, compare=False)
    model: PreTrainedModel | None = field(default=None, compare=False, repr=False)


def observe(loader: Loader, model_class: type[PreTrainedModel], folder: Path, **options: Any) -> Outcome:
    """Load, and write down everything that can be compared. What was raised is part of it."""
    torch.manual_seed(SEED)
    with listening(folder) as messages:
        begin = time.process_time()
        try:
            model, info = loader.load(model_class, folder, output_loading_info=True, **options)
        except Exception as error:  # noqa: BLE001
            return Outcome(None, {}, {}, "", error=told(error, folder))
        seconds = time.process_time() - begin
    random_state = hashlib.sha256(bytes(torch.get_rng_state().numpy())).hexdigest()[:12]
    keys = {key: repr(sorted(map(repr, value))) for key, value in info.items()}
    return Outcome(model_state(model), keys, messages, random_state, seconds=seconds, model=model)


def outcome_differences(expected: Outcome, found: Outcome) -> list[str]:
    """One line for each thing that a caller could tell the two loads apart by."""
    if expected.error and found.error:
        return []
    if expected.error or found.error:
        return [f"raised: expected {expected.error or 'nothing'}, found {found.error or 'nothing'}"]
    return differences(expected.state, found.state) + differences(_said(expected), _said(found))


@dataclass(frozen=True, slots=True)
class Said:
    """The words of an outcome."""

    info: Mapping[str, str]
    messages: Mapping[str, int]
    random_state: str


def _said(outcome: Outcome) -> Said:
    return Said(outcome.info, outcome.messages, outcome.random_state)


@contextmanager
def unwritten_memory_shown() -> Iterator[None]:
    """New tensors hold NaN until they are written, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make_gaps(folder: Path, out: Path, names: Container[str]) -> None:
    """A copy of a checkpoint in which some tensors are missing, one has another shape, and one is unknown.

    Only tensors that are the model's as they are: `names` are the model's.
    """
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    plain = sorted(key for key in tensors if key in names)
    for key in plain[2::7]:
        del tensors[key]
    for key in plain[3:4]:
        tensors[key] = torch.zeros(*tensors[key].shape, 2)
    tensors["of.nothing"] = torch.ones(2)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


@contextmanager
def listening(folder: Path) -> Iterator[dict[str, int]]:
    """Counts what transformers logs from warnings up, and what is warned of, in words that do not name the folder."""
    heard: dict[str, int] = {}

    def note(text: str) -> None:
        text = _plain(text.replace(str(folder), "FOLDER"))
        heard[text] = heard.get(text, 0) + 1

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: note(f"{record.name} {record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    usual, level = logger.handlers[:], logger.level
    warning_once.cache_clear()
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield heard
        for warning in warned:
            note(f"{warning.category.__name__}: {warning.message}")
    finally:
        logger.handlers[:] = usual
        logger.setLevel(level)


def told(error: Exception, folder: Path) -> str:
    """An error in one line that does not name the folder."""
    return f"{type(error).__name__}: {' '.join(str(error).replace(str(folder), 'FOLDER').split())[:300]}"


def _plain(text: str) -> str:
    """Without colours, table lines and order: sets are listed in any order."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = {re.sub(r"\s+", " ", line).strip() for line in re.sub(r"0x[0-9a-f]+", "0x", text).splitlines()}
    return "\n".join(sorted(line for line in lines if line.strip("-+| ")))


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors and the settings of a folder."""

    tensors: Mapping[str, TensorState]
    settings: Mapping[str, str]


def stored(folder: Path) -> Stored:
    """What the files of a checkpoint hold, whatever shards they are in."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return Stored(
        {key: tensor_state("stored", tensor.contiguous()) for key, tensor in tensors.items()},
        {path.name: path.read_text() for path in folder.glob("*config.json")},
    )
