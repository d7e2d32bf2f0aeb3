"""Targets from what was measured, and bytes that differ between loaders."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gpu_suite.report import as_json, document, render
from gpu_suite.schedule import Record
from gpu_suite.verdicts import checked_contents, differences, targets
from suite.machine import describe_machine


def _records(results: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str], Record]:
    return {
        (group, row): Record(group=group, row=row, status="done", result=result)
        for (group, row), result in results.items()
    }


MEASURED = {
    ("hardware", "link"): {"pinned_gb_per_s": 50.0, "pageable_gb_per_s": 10.0},
    ("hardware", "page cache"): {"best_gb_per_s": 40.0},
    ("hardware", "storage"): {"best_gb_per_s": 2.0},
    ("dense warm", "fastload"): {"n_bytes": 16e9, "seconds": [0.4, 0.5, 0.6]},
    ("dense warm", "transformers"): {"n_bytes": 16e9, "seconds": [4.0, 1.6]},
    ("fp32 warm", "fastload"): {"n_bytes": 8e9, "seconds": [1.0]},
    ("fp32 to bf16", "fastload"): {"n_bytes": 8e9, "seconds": [1.25]},
    ("cold", "fastload"): {"n_bytes": 16e9, "seconds": [10.0]},
    ("first forward warm", "fastload"): {"load_s": [2.0], "forward_s": [0.1], "stream_s": [2.1]},
    ("repeated loads", "fastload"): {"host_growth_bytes": 20_000_000, "device_growth_bytes": 0},
}


@pytest.mark.parametrize(
    ("what", "of_medians", "of_minima", "reached"),
    [
        ("dense warm: share of min(page cache, pinned link)", 80, 100, False),
        ("dense warm: transformers / fastload", 5.6, 4, True),
        ("cold: share of the storage's rate", 80, 80, False),
        ("fp32 to bf16: share of the rate without conversion, in source bytes", 80, 80, False),
        ("first forward warm: streamed / max(load, forward)", 1.05, 1.05, True),
        ("repeated loads: growth of host memory", 20, 20, False),
        ("repeated loads: growth of device memory", 0, 0, True),
    ],
)
def test_a_target_is_reached_by_the_figure_of_the_medians(
    what: str, of_medians: float, of_minima: float, reached: bool
) -> None:
    found = next(target for target in targets(_records(MEASURED))[0] if target.what == what)
    assert (found.of_medians, found.of_minima) == pytest.approx((of_medians, of_minima))
    assert found.reached is reached


def test_what_was_not_measured_is_named_with_the_reason() -> None:
    records = _records(MEASURED)
    records["moe warm", "fastload"] = Record(group="moe warm", row="fastload", status="skipped", words="no time: 9 s")
    _, missing = targets(records)
    assert missing["moe warm: transformers / fastload"] == "moe warm of transformers was not measured"
    assert missing["moe warm: share of min(page cache, pinned link)"].endswith(
        "fastload was not measured: no time: 9 s"
    )


def test_bytes_that_differ_are_found_by_content() -> None:
    results = {
        ("dense warm", "fastload"): {"content": "dense", "digest": "aa"},
        ("cold", "fastload"): {"content": "dense", "digest": "aa"},
        ("fp32 to bf16", "fastload"): {"content": "fp32 to bf16", "digest": "cc"},
    }
    assert differences(_records(results)) == []
    assert checked_contents(_records(results)) == {"dense": 2, "fp32 to bf16": 1}
    results["dense warm", "safetensors"] = {"content": "dense", "digest": "bb"}
    assert differences(_records(results)) == [
        "dense: fastload (dense warm) aa, fastload (cold) aa, safetensors (dense warm) bb"
    ]


def test_a_failed_step_and_different_bytes_are_named_in_the_report_which_is_not_whole() -> None:
    about = {"machine": describe_machine(), "accelerator": {"device": "cpu"}}
    options = {"small": False}
    load = {
        "content": "dense",
        "version": "1",
        "n_bytes": 16,
        "first_s": 1.0,
        "seconds": [0.5],
        "host_peak_bytes": 0,
        "device_peak_bytes": 0,
        "cached_share": 1.0,
    }
    records = _records({("dense warm", "fastload"): {**load, "digest": "aa"}})
    assert document(records, about, options, 1)["is_whole"]
    failed = Record(group="moe warm", row="fastload", status="failed", words="RequestFailedError: it died")
    found = document(with_failure := {**records, ("moe warm", "fastload"): failed}, about, options, 1)
    assert not found["is_whole"]
    assert "failed: fastload: RequestFailedError: it died (moe warm)" in render(with_failure, found)
    records["cold", "fastload"] = Record(group="cold", row="fastload", status="done", result={**load, "digest": "bb"})
    found = document(records, about, options, 1)
    assert not found["is_whole"]
    assert "DIFFERENT BYTES: dense" in render(records, found)
    assert json.loads(as_json(found))["differences"] == found["differences"]
