"""A pytest plugin that lets fastload load and save all transformers models of a test run.

    pytest -p fastload.testing.hf_plugin tests/

A suite that passes without it should pass with it. What was fast and what was handed over, with the reasons, stands at
the end of the run; processes that the tests start, or that pytest-xdist starts, are not in these counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastload import hf

if TYPE_CHECKING:
    import pytest

__all__ = ["pytest_configure", "pytest_terminal_summary", "pytest_unconfigure"]


def pytest_configure(config: pytest.Config) -> None:
    """Switch fastload on."""
    hf.reset_stats()
    hf.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave transformers as it was."""
    hf.disable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what fastload did."""
    terminalreporter.section("fastload")
    for line in str(hf.stats()).splitlines():
        terminalreporter.write_line(line)
