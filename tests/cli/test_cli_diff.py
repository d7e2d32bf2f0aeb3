"""fastload diff: what differs between two checkpoints, of whatever formats."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastload.saver import save_state_dict

Command = Callable[..., Any]


def tensors() -> dict[str, torch.Tensor]:
    return {
        "w": torch.arange(12.0).reshape(3, 4),
        "h": torch.ones(5).bfloat16(),
        "n": torch.tensor(3),
        "e": torch.ones(0),
    }


@pytest.mark.parametrize("other", [{"max_shard_size": 48}, {"safe_serialization": False}], ids=["shards", "bin"])
def test_the_same_tensors_are_the_same_in_any_form(command: Command, tmp_path: Path, other: dict[str, Any]) -> None:
    save_state_dict(tensors(), tmp_path / "a")
    save_state_dict(tensors(), tmp_path / "b", **other)
    done = command("diff", tmp_path / "a", tmp_path / "b")
    assert (done.status, done.out) == (0, "4 tensors are the same, 0 differ\n")


def test_every_kind_of_difference_is_told(command: Command, tmp_path: Path) -> None:
    save_state_dict(tensors() | {"old": torch.ones(1), "s": torch.ones(2), "t": torch.ones(2)}, tmp_path / "a")
    changed = tensors() | {"new": torch.ones(1), "s": torch.ones(2, 1), "t": torch.ones(2).half()}
    changed["w"] = changed["w"].clone()
    changed["w"][1, 2] += 0.5
    changed["w"][2, 0] -= 2
    save_state_dict(changed, tmp_path / "b")
    done = command("diff", tmp_path / "a", tmp_path / "b", "--json")
    assert done.status == 1
    found = {row.pop("key"): row for row in done.values["differences"]}
    assert {key: row["kind"] for key, row in found.items()} == {
        "w": "values", "old": "removed", "new": "added", "s": "shape", "t": "dtype",
    }  # fmt: skip
    assert (found["w"]["n_elements"], found["w"]["max_abs"]) == (2, 2.0)
    assert (found["t"]["first"], found["t"]["second"]) == ("float32 [2]", "float16 [2]")
    assert done.values["n_same"] == 3


@pytest.mark.parametrize(
    ("first", "second", "n_elements", "max_abs"),
    [
        (torch.tensor([1, 2**40]), torch.tensor([1, 2**40 + 3]), 1, 3.0),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1, 1.0),
        (torch.tensor([3 + 4j]), torch.tensor([0j]), 1, 5.0),
        (torch.tensor([0.0]), torch.tensor([-0.0]), 1, 0.0),
        (torch.tensor([math.inf, 1]), torch.tensor([math.inf, 2]), 1, 1.0),
        (torch.tensor([1.0]).to(torch.float8_e4m3fn), torch.tensor([2.0]).to(torch.float8_e4m3fn), 1, 1.0),
    ],
    ids=["integers", "booleans", "complex", "signed zeros", "infinities", "8-bit floats"],
)
def test_size_of_a_difference(
    command: Command, tmp_path: Path, first: torch.Tensor, second: torch.Tensor, n_elements: int, max_abs: float
) -> None:
    save_state_dict({"t": first}, tmp_path / "a")
    save_state_dict({"t": second}, tmp_path / "b")
    (row,) = command("diff", tmp_path / "a", tmp_path / "b", "--json").values["differences"]
    assert (row["n_elements"], row["max_abs"]) == (n_elements, max_abs)


def test_number_against_no_number_is_no_number(command: Command, tmp_path: Path) -> None:
    save_state_dict({"t": torch.tensor([1.0, 5.0])}, tmp_path / "a")
    save_state_dict({"t": torch.tensor([math.nan, 9.0])}, tmp_path / "b")
    done = command("diff", tmp_path / "a", tmp_path / "b")
    assert done.status == 1
    assert "~ t: 2 elements differ, by nan at most" in done.out


def test_names_of_tied_tensors_count(command: Command, tmp_path: Path) -> None:
    shared = torch.ones(3)
    save_state_dict({"a": shared, "b": shared}, tmp_path / "a")
    save_state_dict({"a": shared, "b": torch.zeros(3)}, tmp_path / "b")
    done = command("diff", tmp_path / "a", tmp_path / "b")
    assert done.status == 1
    assert "~ b: 3 elements differ, by 1 at most" in done.out


def test_what_cannot_be_compared_is_trouble(command: Command, tmp_path: Path) -> None:
    save_state_dict(tensors(), tmp_path / "a")
    done = command("diff", tmp_path / "a", tmp_path / "missing")
    assert done.status == 2
    assert "no such file or folder" in done.err
