"""Pausing the cyclic garbage collector while a load makes thousands of objects that all stay."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused_collector"]

_lock = threading.Lock()
_n_pauses = 0
_resume = False


@contextmanager
def paused_collector() -> Iterator[None]:
    """No cyclic collection inside; afterwards the collector is as it was, however many threads pause at once.

    The collector counts new objects and then visits every object of the process. With torch imported that takes 20 ms
    or more, and finds nothing: modules, parameters and specs of a model that is being built are all in use.
    """
    global _n_pauses, _resume
    with _lock:
        if _n_pauses == 0:
            _resume = gc.isenabled()
            gc.disable()
        _n_pauses += 1
    try:
        yield
    finally:
        with _lock:
            _n_pauses -= 1
            if _n_pauses == 0 and _resume:
                gc.enable()
