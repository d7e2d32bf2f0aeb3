"""Switching fastload on for the transformers of a whole program, or of a part of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from fastload.hf.counting import count_load, count_save
from fastload.hf.loading import Loading, load, loading_class
from fastload.hf.versions import unsupported_reason

__all__ = ["disable", "enable", "enabled"]

_lock = threading.Lock()
_n_users = 0
_is_on_for_all = False
_originals: dict[str, Any] = {}
_IS_ON_HERE: ContextVar[bool] = ContextVar("fastload_hf_is_on", default=False)


@contextmanager
def enabled() -> Iterator[None]:
    """Models that this thread loads and saves through transformers inside are loaded and saved by fastload.

    Concrete classes, pipelines and other libraries are meant too. Other threads (and their loads) are not.
    """
    _install()
    token = _IS_ON_HERE.set(True)
    try:
        yield
    finally:
        _IS_ON_HERE.reset(token)
        _uninstall()


def enable() -> None:
    """As `enabled`, for all threads, until `disable`."""
    global _is_on_for_all
    with _lock:
        was_on, _is_on_for_all = _is_on_for_all, True
    if not was_on:
        _install()


def disable() -> None:
    """Undo `enable`. transformers is then what it was, unless an `enabled` is under way."""
    global _is_on_for_all
    with _lock:
        was_on, _is_on_for_all = _is_on_for_all, False
    if was_on:
        _uninstall()


def _is_on() -> bool:
    return _is_on_for_all or _IS_ON_HERE.get()


def _install() -> None:
    global _n_users
    with _lock:
        _n_users += 1
        if _n_users == 1:
            for name, replace in (("from_pretrained", _loading), ("save_pretrained", _saving)):
                _originals[name] = vars(PreTrainedModel)[name]
                setattr(PreTrainedModel, name, replace(_originals[name]))


def _uninstall() -> None:
    global _n_users
    with _lock:
        _n_users -= 1
        if _n_users == 0:
            for name, original in _originals.items():
                setattr(PreTrainedModel, name, original)


def _loading(original: Any) -> Any:
    stock: Callable[..., Any] = original.__func__

    @wraps(stock)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_on() or issubclass(cls, Loading):
            return stock(cls, *args, **kwargs)
        if reason := unsupported_reason():
            count_load(reason)
            return stock(cls, *args, **kwargs)
        return load(stock.__get__(loading_class(cls)), args, kwargs)

    return classmethod(from_pretrained)


def _saving(original: Any) -> Any:
    @wraps(original)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_on():
            return original(self, *args, **kwargs)
        if reason := unsupported_reason():
            count_save(reason)
            return original(self, *args, **kwargs)
        from fastload.hf.saving import save_pretrained

        return save_pretrained(self, *args, stock=original, **kwargs)

    return save
