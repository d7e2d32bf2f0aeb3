"""One load done twice, by transformers alone and by fastload, and held side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastload import hf
from tests.conformance.compare import differences, model_state
from tests.conformance.loading import Fastload, Outcome, Stock, observe, outcome_differences

__all__ = ["assert_same_load", "assert_same_models", "assert_same_outcome"]


def assert_same_load(model_class: Any, folder: Path | str | None, *, reason: str = "", **options: Any) -> Outcome:
    """Both loads give the same model and say the same. Returns fastload's.

    Args:
        model_class, folder, options: the load.
        reason: why fastload hands it over, where it does.
    """
    before = hf.stats()
    found = assert_same_outcome(model_class, folder, **options)
    assert not found.error
    after = hf.stats()
    assert after.fast_loads - before.fast_loads == (not reason)
    assert after.reasons.get(reason, 0) - before.reasons.get(reason, 0) == bool(reason)
    return found


def assert_same_outcome(model_class: Any, folder: Path | str | None, **options: Any) -> Outcome:
    """As `assert_same_load`, where both may fail, with the same error."""
    expected = observe(Stock(), model_class, folder, **options)
    found = observe(Fastload(), model_class, folder, **options)
    assert found.error == expected.error
    if not expected.error:
        assert outcome_differences(expected, found) == []
    return found


def assert_same_models(expected: Any, found: Any) -> None:
    """Nothing that a user could notice differs between two models."""
    assert differences(model_state(expected), model_state(found)) == []
