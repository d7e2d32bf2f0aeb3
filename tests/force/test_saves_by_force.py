"""A save that is killed, refused or without power at any moment leaves the old or the new checkpoint, to the bit.

The counts are printed; README has them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.force.programs import outcome_of


def test_save_killed_at_any_system_call_leaves_the_old_or_the_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = outcome_of("killed", tmp_path)
    calls: Counter[str] = Counter()
    for result in results:
        assert result["problems"] == [], result["what"]
        assert result["kills"] > 15, result["what"]
        assert result["both"], f"{result['what']}: never the old one, or never the new one"
        calls.update(result["calls"])
    assert {"openat", "writev", "fsync", "rename", "unlink"} <= calls.keys()
    with capsys.disabled():
        by_call = ", ".join(f"{count} {name}" for name, count in calls.most_common())
        print(f"\nkill -9: {sum(calls.values())} fault points in {len(results)} kinds of saves ({by_call}): none lost")


def test_save_that_the_system_refuses_says_what_the_folder_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = outcome_of("refused", tmp_path)
    for fault, result in results.items():
        assert result["problems"] == [], fault
        assert result["refused, old"] > 5, fault
    with capsys.disabled():
        for fault, result in results.items():
            print(f"\n{fault}: {result['faults']} fault points, {result['saved']} saved all the same", end="")
        print(f"\nrefused: {sum(result['faults'] for result in results.values())} fault points: none lost")


def test_save_that_loses_power_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = outcome_of("powerless", tmp_path)
    for what, result in results.items():
        assert result["problems"] == [], what
        assert result["old"] > 5, what
        assert result["new"] > 5, what
    with capsys.disabled():
        print(f"\npower failure: {sum(result['folders'] for result in results.values())} different folders: none lost")


def test_save_to_a_full_or_read_only_disk_leaves_the_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = outcome_of("full", tmp_path, traces=False)
    if reason := results.get("refused"):
        pytest.skip(reason)
    for what, result in results.items():
        assert result["problems"] == [], what
        assert result["told"], what
    with capsys.disabled():
        print(f"\nfull and read-only tmpfs: {sum(result['told'] for result in results.values())} saves: none lost")
