"""Sizes as people write them, and the same shards as huggingface_hub makes."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from huggingface_hub.serialization._base import split_state_dict_into_shards_factory
from hypothesis import given

from fastload.errors import OptionError
from fastload.plan.sharding import parse_size, split_into_shards


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [
        (1, 1),
        (5_000_000_000, 5_000_000_000),
        ("5GB", 5_000_000_000),
        ("5GiB", 5 << 30),
        ("1.5 mb", 1_500_000),
        (" 2KiB ", 2048),
        ("1tb", 10**12),
        ("300B", 300),
        (".5kb", 500),
    ],
)
def test_size_is_decimal_unless_it_says_binary(size: int | str, n_bytes: int) -> None:
    assert parse_size(size) == n_bytes


@pytest.mark.parametrize(
    "size",
    [0, -1, True, 5e9, None, "", "5", "GB", "5XB", "-5GB", "0GB", "0.1B", "1e3GB", "5GB!", "nanGB", "5 G B", "٣GB"],
)
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(OptionError, match="max_shard_size is not a size"):
        parse_size(size)  # type: ignore[arg-type]


def test_option_is_named_as_the_caller_spells_it() -> None:
    with pytest.raises(OptionError, match="max_memory is not a size"):
        parse_size("much", "max_memory")


def test_large_tensor_has_a_shard_to_itself() -> None:
    sizes = {"a": 3, "large": 20, "b": 3, "c": 5, "d": 1}
    assert split_into_shards(sizes, 10) == [["large"], ["a", "b"], ["c", "d"]]


def test_no_tensors_are_one_empty_shard() -> None:
    assert split_into_shards({}, 10) == [[]]


def test_group_stays_together_and_counts_once() -> None:
    sizes = {"a": 6, "b": 6, "a.tied": 0, "large": 30, "c": 4, "large.tied": 0}
    together = {"a": 1, "a.tied": 1, "large": 2, "large.tied": 2}
    assert split_into_shards(sizes, 10, together) == [["a", "a.tied"], ["large", "large.tied"], ["b", "c"]]


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    limit=st.integers(1, 40),
    groups=st.lists(st.integers(0, 8), min_size=30, max_size=30),
)
def test_shards_are_those_of_huggingface_hub(sizes: list[int], limit: int, groups: list[int]) -> None:
    # A group above 3 stands for none.
    tensors = {str(i): (size, group if group < 3 else None) for i, (size, group) in enumerate(zip(sizes, groups))}  # noqa: B905
    expected = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor[0],
        get_storage_id=lambda tensor: tensor[1],
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    together = {key: group for key, (_, group) in tensors.items() if group is not None}
    shards = split_into_shards({key: size for key, (size, _) in tensors.items()}, limit, together)
    assert [sorted(shard) for shard in shards] == [sorted(keys) for keys in expected.filename_to_tensors.values()]
