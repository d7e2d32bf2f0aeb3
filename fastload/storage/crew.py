"""Threads that are kept from one transfer to the next, for as long as their owner lives.

A transfer has a dozen threads; to start them takes a millisecond or two, each time. A model whose blocks come for every
forward has a transfer for each, and keeps the threads.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

__all__ = ["Crew", "Start", "Work", "start_thread"]


class Work(Protocol):
    """What a thread is at."""

    def join(self) -> None:
        """Wait for its end."""


Start = Callable[[Callable[[], None], str], Work]
"""Has a thread do something, which raises nothing; with a name for it."""


def start_thread(do: Callable[[], None], name: str) -> Work:
    """Do something on a thread that ends with it."""
    thread = threading.Thread(target=do, name=name, daemon=True)
    thread.start()
    return thread


class Crew:
    """Threads that do one thing after another. There is one for everything that is begun: nothing waits for its turn.

    They end with this object, when they are done with what they are at.
    """

    def __init__(self) -> None:
        self._shared = _Shared()
        weakref.finalize(self, self._shared.dismiss)

    def start(self, do: Callable[[], None], name: str) -> Work:
        """Have an idle thread do something, or a new one. Threads have the name of the first thing that they do."""
        task = _Task(do)
        with self._shared.lock:
            is_new = not self._shared.n_idle
            self._shared.n_idle -= not is_new
        if is_new:
            start_thread(self._shared.work, name)
            self._shared.n_threads += 1
        self._shared.tasks.put(task)
        return task


class _Task:
    """Something to do."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do: Callable[[], None] | None = do
        # A lock and no event: ctrl-C in the midst of waiting for it leaves it as it is.
        self.under_way = threading.Lock()
        self.under_way.acquire()

    def join(self) -> None:
        with self.under_way:
            pass


class _Shared:
    """What the threads have in common. They hold nothing of the crew, so that it can die."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self.n_idle = 0
        self.n_threads = 0

    def work(self) -> None:
        while (task := self.tasks.get()) is not None:
            assert task.do is not None
            task.do()
            task.do = None
            with self.lock:
                self.n_idle += 1
            task.under_way.release()
            del task  # what it was about may be gone before the next one comes

    def dismiss(self) -> None:
        for _ in range(self.n_threads):
            self.tasks.put(None)
