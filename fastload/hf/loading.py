"""The seam in transformers' from_pretrained: one stage replaced, everything around it left to transformers.

transformers builds a model on meta, calls the class for `_load_pretrained_model`, which reads and places the weights,
then for `_finalize_model_loading`. Here that class is a subclass of the model's which answers the first call with
fastload's plan and placement, and whose instances are the model's own class: it exists only while a model is loaded,
and nothing of transformers is changed for anyone else.

transformers swaps functions of torch while it builds and while it initialises, for all threads; two loads at once then
put back each other's. So these two stages run one load at a time, and placing, which is where the time goes, at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from fastload.errors import FastloadError, KeyMatchError, OptionError
from fastload.hf.completing import finish
from fastload.hf.counting import count_load
from fastload.hf.handing_over import reason_to_hand_over
from fastload.hf.offloading import DiskWeights
from fastload.hf.placing import place_weights
from fastload.initialisers import BuildOnMeta
from fastload.loader import parse_pinned_memory
from fastload.options import FileOptions, HubOptions, LoadOptions
from fastload.pauses import paused_collector
from fastload.prefetching import read_ahead_early
from fastload.reports import collapse_keys
from fastload.streaming.arrivals import parse_memory_budget

__all__ = ["Loading", "load", "loading_class", "read_ahead_for"]

# With any of these a rank reads parts of the files, and which will be known when the model is there.
_OVER_RANKS = ("device_mesh", "distributed_config", "tp_plan", "tp_size")
# Held while transformers has functions of torch, or its own, replaced for the whole process.
_GLOBALS_LOCK = threading.RLock()


@dataclass(slots=True)
class _Load:
    """One call of from_pretrained.

    Attributes:
        how: what was asked of fastload alone.
        verify: compare the files' bytes with their checksums.
        rebuild: builds the model again as it was built for this load.
        begin: lets weights arrive that come after the load; None until fastload has placed the others.
        disk: what stays on disk.
    """

    how: LoadOptions
    verify: bool = False
    rebuild: Callable[[], Any] | None = None
    begin: Callable[[], object] | None = None
    disk: DiskWeights | None = None

    @property
    def arrives_later(self) -> bool:
        """Whether weights come after the load."""
        return self.how.is_deferred or self.how.memory_budget_bytes is not None


_CURRENT: ContextVar[_Load | None] = ContextVar("fastload_hf_load", default=None)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    with _GLOBALS_LOCK:
        yield


class Loading:
    """Base of the classes that `loading_class` makes."""

    _fastload_class: ClassVar[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A model of the original class; since that is not this one, Python does not initialise it again."""
        model = cls._fastload_class(*args, **kwargs)
        current = _CURRENT.get()
        if current is not None:
            current.rebuild = lambda: cls._fastload_class(model.config, *args[1:], **kwargs)
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """What the class would load, by fastload."""
        return load(super().from_pretrained, args, kwargs)  # type: ignore[misc]

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        """The contexts in which transformers builds the model, entered by one load at a time."""
        contexts = super().get_init_context(*args, **kwargs)  # type: ignore[misc]
        on_meta = torch.device("meta")
        return [_one_at_a_time(), *(BuildOnMeta() if context == on_meta else context for context in contexts)]

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        reason = reason_to_hand_over(model, state_dict, checkpoint_files, load_config)
        count_load(reason)
        current = _CURRENT.get()
        if reason:
            if current is not None and current.verify:
                raise OptionError(
                    "files are not verified where transformers places weights", found=reason, fix="leave out verify"
                )
            if current is not None and current.arrives_later:
                raise OptionError(
                    "weights cannot arrive later where transformers places them",
                    found=reason,
                    fix="leave out lazy, stream and memory_budget",
                )
            return type(model)._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
        if load_config.device_mesh is not None and current is not None and current.arrives_later:
            raise OptionError(
                "what is laid out over ranks cannot arrive later", fix="leave out lazy, stream and memory_budget"
            )
        # As in transformers, whose threads know nothing of the caller's mode: what is made in it can never be trained.
        with torch.inference_mode(False):
            how = LoadOptions() if current is None else current.how
            verify = current is not None and current.verify
            info, disk, begin = place_weights(model, state_dict, checkpoint_files, load_config, how, verify=verify)
        if current is not None:
            current.disk, current.begin = disk, begin
        return info, None if disk is None else disk.index

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        current = _CURRENT.get()
        with _GLOBALS_LOCK:
            if current is None or current.begin is None:
                return type(model)._finalize_model_loading(model, load_config, loading_info)
            info = finish(model, load_config, loading_info, current.rebuild)
        if current.disk is not None:
            current.disk.keep(model, load_config)
        if current.how.strict:
            _check_keys(info, load_config.pretrained_model_name_or_path)
        current.begin()
        return info


_CLASSES: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def loading_class(model_class: Any) -> Any:
    """The class whose from_pretrained loads a model class by fastload. Made once for each."""
    found = _CLASSES.get(model_class)
    if found is None:
        names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__, "__doc__": None}
        made = type(model_class.__name__, (Loading, model_class), names | {"_fastload_class": model_class})
        found = _CLASSES.setdefault(model_class, made)
    return found


def load(from_pretrained: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a from_pretrained whose class is a `Loading`.

    Args:
        from_pretrained: bound to that class.
        args, kwargs: the caller's. Fastload's own among them are ``strict`` (KeyMatchError where keys do not fit),
            ``verify``, ``lazy``, ``stream``, ``memory_budget`` and ``pinned_memory`` (see
            `PretrainedLoading.from_pretrained`).
    """
    options = dict(kwargs)
    budget = options.pop("memory_budget", None)
    how = LoadOptions(
        strict=bool(options.pop("strict", False)),
        lazy=bool(options.pop("lazy", False)),
        stream=bool(options.pop("stream", False)),
        memory_budget_bytes=parse_memory_budget(budget),
        pinned_bytes=parse_pinned_memory(options.pop("pinned_memory", None)),
    )
    current = _Load(how, verify=bool(options.pop("verify", False)))
    read_ahead_for(args, kwargs)
    token = _CURRENT.set(current)
    try:
        with paused_collector():
            loaded = from_pretrained(*args, **options)
        if current.disk is not None:
            current.disk.attach(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded
    finally:
        _CURRENT.reset(token)


def read_ahead_for(args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Begin to read what is cold of the files that a call of from_pretrained is about.

    Files that are being read are joined; within a memory budget only what it allows is read, later. Whatever is wrong
    with the arguments, transformers will say.
    """
    path = args[0] if args else options.get("pretrained_model_name_or_path")
    in_parts = ("gguf_file", "memory_budget", *_OVER_RANKS)
    if path is None or any(options.get(name) is not None for name in in_parts):
        return
    with suppress(FastloadError, TypeError):
        files = FileOptions(
            variant=options.get("variant"),
            subfolder=options.get("subfolder") or "",
            use_safetensors=options.get("use_safetensors"),
        )
        hub = HubOptions(revision=options.get("revision"), cache_dir=options.get("cache_dir"), local_files_only=True)
        read_ahead_early(path, files, hub)


def _check_keys(info: Any, path: object) -> None:
    problems = [f"missing in the files: {row}" for row in collapse_keys(sorted(info.missing_keys))]
    problems += [f"not in the model: {row}" for row in collapse_keys(sorted(info.unexpected_keys))]
    problems += [
        f"shape of {name}: {list(found)} in the files, {list(built)} in the model"
        for name, found, built in sorted(info.mismatched_keys)
    ]
    if problems:
        raise KeyMatchError(
            f"the checkpoint does not fit the model ({len(problems)} problems)",
            file=None if path is None else str(path),
            found="\n            ".join(problems),
            fix="load with the config that the checkpoint was saved with, rename keys with key_mapping, or pass "
            "strict=False",
        )
