"""Reports for people."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.reports import LoadReport, collapse_keys, format_bytes


def test_a_run_of_layers_is_one_row() -> None:
    assert collapse_keys([f"layers.{i}.x" for i in range(12)]) == ["layers.{0...11}.x"]


def test_gaps_are_shown() -> None:
    assert collapse_keys(["h.0.w", "h.1.w", "h.5.w"]) == ["h.{0...1, 5}.w"]


def test_a_single_layer_keeps_its_number() -> None:
    assert collapse_keys(["h.3.w", "h.3.b"]) == ["h.3.w", "h.3.b"]


def test_two_numbers_collapse_one_after_the_other() -> None:
    keys = [f"layers.{i}.experts.{j}.w" for i in range(2) for j in range(3)]
    assert collapse_keys(keys) == ["layers.{0...1}.experts.{0...2}.w"]


def test_names_that_differ_are_rows_of_their_own_in_order() -> None:
    assert collapse_keys(["b", "a", "b"]) == ["b", "a"]


@given(st.lists(st.sampled_from(["a", "h.0.w", "h.1.w", "h.2.b", "0.w", "x.1.y.2.z", "x.1.y.3.z"])))
def test_collapsing_loses_no_key(keys: list[str]) -> None:
    rows = collapse_keys(keys)
    assert len(rows) <= len(set(keys))
    assert bool(rows) == bool(keys)


@pytest.mark.parametrize(("n", "text"), [(0, "0 B"), (999, "999 B"), (90_868_376, "90.9 MB"), (2e12, "2.00 TB")])
def test_sizes_are_decimal(n: int, text: str) -> None:
    assert format_bytes(int(n)) == text


def test_a_report_prints_and_is_plain_data() -> None:
    report = LoadReport(
        source="dir",
        files=("model.safetensors",),
        format="safetensors",
        n_tensors=2,
        n_bytes=1000,
        n_read_bytes=1100,
        bytes_by_action={"map": 750, "cast": 250},
        stages_ms={"open": 1.0, "place": 1.0},
        missing_keys=("a.0.w", "a.1.w"),
    )
    assert report.mapped_share == 0.75
    assert report.gb_per_s == pytest.approx(1000 / 2e-3 / 1e9)
    text = str(report)
    assert "2, 1.0 kB, 1.1 kB asked of the files" in text
    assert "75% mapped without copying" in text
    assert "missing  a.{0...1}.w" in text
    assert json.loads(json.dumps(report.to_dict()))["mapped_share"] == 0.75
