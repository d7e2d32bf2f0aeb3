"""Switching fastload on: for a part of a program and one thread, or for all of it, and off without a trace."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel

from fastload import hf
from tests.hf.families import FAMILIES
from tests.hf.sides import assert_same_models

Written = Callable[..., Path]
Bert = transformers.BertForMaskedLM


def loads_fast(written: Written) -> bool:
    """Whether a load at this moment, on this thread, is done by fastload."""
    before = hf.stats().fast_loads
    Bert.from_pretrained(written("bert"))
    return hf.stats().fast_loads == before + 1


def is_untouched() -> bool:
    return (vars(PreTrainedModel)["from_pretrained"], vars(PreTrainedModel)["save_pretrained"]) == ORIGINALS


ORIGINALS = (vars(PreTrainedModel)["from_pretrained"], vars(PreTrainedModel)["save_pretrained"])


def test_only_what_is_inside_is_loaded_by_fastload(written: Written) -> None:
    assert not loads_fast(written)
    with hf.enabled():
        assert loads_fast(written)
        assert not is_untouched()
    assert is_untouched()
    assert not loads_fast(written)


def test_it_nests(written: Written) -> None:
    with hf.enabled():
        with hf.enabled():
            assert loads_fast(written)
        assert loads_fast(written)
    assert is_untouched()


def test_an_exception_switches_it_off_too(written: Written, tmp_path: Path) -> None:
    with pytest.raises(OSError), hf.enabled():
        Bert.from_pretrained(tmp_path)
    assert is_untouched()
    assert not loads_fast(written)
    with pytest.raises(RuntimeError, match="mine"), hf.enabled(), hf.enabled():
        raise RuntimeError("mine")
    assert is_untouched()


def test_enable_and_disable_count_once_each(written: Written) -> None:
    hf.disable()
    assert is_untouched()
    hf.enable()
    hf.enable()
    try:
        assert loads_fast(written)
        with hf.enabled():
            assert loads_fast(written)
        assert loads_fast(written)
    finally:
        hf.disable()
    assert is_untouched()
    assert not loads_fast(written)
    hf.disable()
    assert is_untouched()


def test_disable_leaves_a_context_that_is_open_alone(written: Written) -> None:
    with hf.enabled():
        hf.enable()
        hf.disable()
        assert loads_fast(written)
    assert is_untouched()


def test_enable_inside_a_context_outlasts_it(written: Written) -> None:
    try:
        with hf.enabled():
            hf.enable()
        assert loads_fast(written)
    finally:
        hf.disable()
    assert is_untouched()


def test_a_context_is_for_its_own_thread(written: Written) -> None:
    with hf.enabled():
        assert on_another_thread(lambda: loads_fast(written)) is False
        assert on_another_thread(lambda: type(Bert.from_pretrained(written("bert")))) is Bert
        assert loads_fast(written)
    hf.enable()
    try:
        assert on_another_thread(lambda: loads_fast(written)) is True
    finally:
        hf.disable()


def test_contexts_of_two_threads_may_end_in_any_order(written: Written) -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def hold() -> bool:
        with hf.enabled():
            entered.set()
            may_leave.wait(60)
            return loads_fast(written)

    results: list[bool] = []
    holder = threading.Thread(target=lambda: results.append(hold()))
    with hf.enabled():
        holder.start()
        entered.wait(60)
    assert not loads_fast(written)
    assert not is_untouched()
    may_leave.set()
    holder.join(60)
    assert results == [True]
    assert is_untouched()


def test_tasks_that_begin_inside_are_inside(written: Written) -> None:
    async def load() -> bool:
        with hf.enabled():
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
            return await task

    async def child() -> bool:
        return loads_fast(written)

    assert asyncio.run(load())
    assert is_untouched()


def test_concrete_classes_and_auto_classes_are_switched(written: Written) -> None:
    expected = transformers.LlamaForCausalLM.from_pretrained(written("llama"))
    hf.reset_stats()
    with hf.enabled():
        concrete = transformers.LlamaForCausalLM.from_pretrained(written("llama"))
        auto = transformers.AutoModelForCausalLM.from_pretrained(written("llama"))
        both = hf.AutoModelForCausalLM.from_pretrained(written("llama"))
    assert hf.stats() == hf.Stats(fast_loads=3)
    for found in (concrete, auto, both):
        assert_same_models(expected, found)


def test_the_switched_method_says_what_it_is(written: Written) -> None:
    stock = PreTrainedModel.from_pretrained
    with hf.enabled():
        switched = PreTrainedModel.from_pretrained
        assert (switched.__name__, switched.__doc__) == (stock.__name__, stock.__doc__)
        assert (switched.__qualname__, switched.__module__) == (stock.__qualname__, stock.__module__)


def test_models_built_inside_are_what_they_are_outside() -> None:
    with hf.enabled():
        model = transformers.BertModel(FAMILIES["bert"][1]())
    assert type(model) is transformers.BertModel


def on_another_thread(what: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(what()))
    thread.start()
    thread.join(60)
    return results[0]
