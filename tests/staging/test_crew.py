"""Threads that are kept: as many as are at work at a time, until their owner is gone."""

from __future__ import annotations

import gc
import signal
import threading

import pytest

from fastload.storage.crew import Crew
from tests.cold import threads, wait_for_no_threads


def test_what_comes_one_after_another_is_done_by_one_thread() -> None:
    crew, by = Crew(), []
    for _ in range(20):
        crew.start(lambda: by.append(threading.get_ident()), "fastload-one").join()
    assert len(by) == 20
    assert len(set(by)) == 1
    assert threads() == ["fastload-one"]


def test_what_is_under_way_at_a_time_does_not_wait_for_its_turn() -> None:
    crew, together = Crew(), threading.Barrier(8)
    works = [crew.start(lambda: together.wait(10) and None, "fastload-many") for _ in range(8)]
    for work in works:
        work.join()
    assert not together.broken
    assert len(threads()) == 8
    for work in works:
        work.join()  # returns at once


def test_the_threads_end_with_the_crew_and_not_before_they_are_done() -> None:
    crew, gate, done = Crew(), threading.Event(), threading.Event()

    def work() -> None:
        gate.wait()
        done.set()

    crew.start(work, "fastload-last")
    del crew
    gc.collect()
    assert threads() == ["fastload-last"]
    gate.set()
    wait_for_no_threads()
    assert done.is_set()


def test_ctrl_c_while_waiting_leaves_a_crew_that_works() -> None:
    crew, gate = Crew(), threading.Event()
    work = crew.start(gate.wait, "fastload-held")  # type: ignore[arg-type]
    timer = threading.Timer(0.05, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        work.join()
    timer.join()
    gate.set()
    work.join()
    crew.start(lambda: None, "fastload-next").join()
