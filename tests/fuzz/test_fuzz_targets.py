"""The fuzz targets on what is kept of fuzzing, and on structured mutations of valid headers. ``make fuzz`` goes on."""

from __future__ import annotations

import struct
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from safetensors import deserialize

from tests.fuzz.corpus import read_corpus
from tests.fuzz.differences import STRICTER, Difference, difference_of
from tests.fuzz.mutating import mutate_json
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS, check_as_official

HEADERS = [
    '{"__metadata__":{"format":"pt","note":"a \\u00fc"},"a":{"dtype":"F32","shape":[5,3],"data_offsets":[0,60]},'
    '"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[60,64]},"c":{"dtype":"F64","shape":[0],"data_offsets":[64,64]}}',
    '{"b": {"dtype": "F4", "shape": [2, 4], "data_offsets": [60, 64]}, "more": {"data_offsets": [0, 60], '
    '"unknown": {"x": [1, 2.5e3, null]}, "shape": [60], "dtype": "U8"}}   ',
]
DATA = bytes(range(64))


def file_of(header: bytes, n_data: int = 64) -> bytes:
    return struct.pack("<Q", len(header)) + header + DATA[:n_data].ljust(n_data, b"x")


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A file with a header whose tokens were mutated, and mostly with as much data as it had before."""
    header = mutate_json(draw(st.sampled_from(HEADERS)).encode(), draw(st.integers(0, 2**63).map(Random)))
    return file_of(header, draw(st.sampled_from([64] * 8 + [0, 60, 63, 65])))


@given(mutations())
@settings(max_examples=3_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_header_is_taken_if_and_only_if_the_official_reader_takes_it(content: bytes) -> None:
    check_as_official(content)


@pytest.mark.parametrize("header", HEADERS)
def test_the_headers_that_are_mutated_are_valid(header: str) -> None:
    assert check_as_official(file_of(header.encode()))


ENTRY = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
DIFFERENT = [
    f' {{"a":{ENTRY}}}',
    f'{{"a":{ENTRY},"a":{ENTRY}}}',
    '{"a":["U8",[2],[0,2]]}',
    '{"a":{"dtype":"F4","shape":[4,1],"data_offsets":[0,2]}}',
    f'{{"a":{ENTRY},"b":{{"dtype":"U8","shape":[0,{2**62},{2**62}],"data_offsets":[2,2]}}}}',
]


@pytest.mark.parametrize(("difference", "header"), [*zip(STRICTER, DIFFERENT, strict=True)])
def test_every_difference_from_the_official_reader_is_one(difference: Difference, header: str) -> None:
    content = file_of(header.encode(), 2)
    assert deserialize(content)
    assert difference_of(header.encode()) == difference
    assert not check_as_official(content)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_kept_of_fuzzing_is_no_finding(target: str) -> None:
    inputs = read_corpus(target)
    assert len(inputs) > 25
    for data in [*seeds(target), *inputs]:
        TARGETS[target](data)


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"safetensors_header", "safetensors_file"}))
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_valid_input_cut_and_changed_is_no_finding(target: str, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(list(seeds(target)))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    TARGETS[target](bytes(content))
