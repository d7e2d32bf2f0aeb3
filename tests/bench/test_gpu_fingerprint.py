"""The digest that a device computes: any change of bytes, types, shapes or names changes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_suite.fingerprint import fingerprint


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(70, 30, generator=generator).bfloat16(),
        "scale": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
        "nan": torch.tensor([float("nan"), 1.0]),
        "complex": torch.randn(3, dtype=torch.complex64, generator=generator),
        "mask": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 4),
    }


def test_equal_tensors_have_one_digest_in_whatever_order_or_memory_they_are() -> None:
    tensors = _tensors()
    other = {name: tensors[name].clone() for name in reversed(tensors)}
    other["weight"] = tensors["weight"].t().contiguous().t()
    assert fingerprint(tensors) == fingerprint(other)


def test_a_module_has_the_digest_of_its_state() -> None:
    module = torch.nn.Linear(4, 2)
    assert fingerprint(module) == fingerprint(dict(module.state_dict()))


def _flip_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["weight"].view(torch.int16)[69, 29] ^= 1


def _exchange_values(tensors: dict[str, torch.Tensor]) -> None:
    tensors["weight"][0, :2] = tensors["weight"][0, :2].flip(0)


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["other"] = tensors.pop("weight")


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["weight"] = tensors["weight"].reshape(30, 70)


def _retype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["weight"] = tensors["weight"].view(torch.float16)


def _invert(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mask"] = ~tensors["mask"]


@pytest.mark.parametrize("change", [_flip_a_bit, _exchange_values, _rename, _reshape, _retype, _invert])
def test_a_change_changes_it(change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    changed = _tensors()
    change(changed)
    assert fingerprint(changed) != fingerprint(_tensors())


def test_blocks_that_are_exchanged_change_it() -> None:
    blocks = torch.randint(256, (2, 1 << 22), dtype=torch.uint8)
    assert fingerprint({"x": blocks.flatten()}) != fingerprint({"x": blocks.flip(0).flatten()})
