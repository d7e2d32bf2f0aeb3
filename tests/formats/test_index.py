from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastload.errors import IndexFileError, UnreadableFileError
from fastload.formats import index as index_module
from fastload.formats.index import encode_index, read_index


def written(folder: Path, content: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_index_gives_files_and_metadata(tmp_path: Path) -> None:
    path = written(tmp_path, {"metadata": {"total_size": 8}, "weight_map": {"b": "2.bin", "a": "1.bin", "c": "1.bin"}})
    index = read_index(path)
    assert index.weight_map == {"b": "2.bin", "a": "1.bin", "c": "1.bin"}
    assert index.metadata == {"total_size": 8}
    assert index.shards == ("1.bin", "2.bin")


@pytest.mark.parametrize("extra", [{}, {"metadata": None}])
def test_missing_metadata_is_empty(tmp_path: Path, extra: dict[str, object]) -> None:
    assert read_index(written(tmp_path, {"weight_map": {"a": "f"}, **extra})).metadata == {}


def test_file_below_the_folder_is_allowed(tmp_path: Path) -> None:
    index = read_index(written(tmp_path, {"weight_map": {"a": "parts/1.bin", "b": "./2.bin"}}))
    assert index.weight_map == {"a": "parts/1.bin", "b": "2.bin"}


def test_encoded_index_is_what_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=50
    )
    transformers.BertModel(config).save_pretrained(tmp_path, max_shard_size="1KB")
    theirs = (tmp_path / "model.safetensors.index.json").read_text()
    read = read_index(tmp_path / "model.safetensors.index.json")
    shuffled = dict(sorted(read.weight_map.items(), reverse=True))
    assert encode_index(shuffled, read.metadata["total_parameters"], read.metadata["total_size"]) == theirs


def test_encoded_index_reads_back(tmp_path: Path) -> None:
    text = encode_index({"ü": "x.bin"}, 1, 2)
    assert text.endswith("}\n")
    index = read_index(written(tmp_path, text.encode()))
    assert index.weight_map == {"ü": "x.bin"}
    assert index.metadata == {"total_parameters": 1, "total_size": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"weight_map": ', "not valid JSON"),
        (b"\xff\xfe\xfd", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"weight_map": {"a": ' + b"9" * 5000 + b"}}", "not valid JSON"),
        (b'{"weight_map": {"a": "1", "a": "2"}}', "'a' stands twice"),
        (b'{"weight_map": {"a": "1"}, "weight_map": {"b": "2"}}', "'weight_map' stands twice"),
        ([], "not a JSON object"),
        (None, "not a JSON object"),
        ({}, "maps no key to a file"),
        ({"weight_map": {}}, "maps no key to a file"),
        ({"weight_map": ["a"]}, "maps no key to a file"),
        ({"weight_map": {"a": 1}}, "names files that a shard may not be"),
        ({"weight_map": {"a": None}}, "names files that a shard may not be"),
        ({"weight_map": {"a": ["f"]}}, "names files that a shard may not be"),
        ({"weight_map": {"a": "f"}, "metadata": [1]}, "metadata is not an object"),
    ],
)
def test_what_is_no_index_is_rejected(tmp_path: Path, content: object, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(IndexFileError, match=message) as caught:
        read_index(path)
    assert caught.value.file == str(path)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../model.safetensors", "leaves the folder"),
        ("a/../../b", "leaves the folder"),
        ("a/../b", "leaves the folder"),
        ("..", "leaves the folder"),
        ("/etc/passwd", "is absolute"),
        ("//host/share", "is absolute"),
        ("..\\b", "contains a backslash"),
        ("C:\\b", "contains a backslash"),
        ("a\0b", "contains a NUL"),
        ("", "names no file"),
        (".", "names no file"),
        ("./", "names no file"),
        ("a/", "names no file"),
        ("\ud800", "is not text"),
        ("a/" + "b" * 256, "is longer than a file name"),
    ],
)
def test_name_that_leaves_the_folder_is_rejected(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(IndexFileError, match=reason) as caught:
        read_index(written(tmp_path, {"weight_map": {"fine": "model.bin", "bad": name}}))
    assert caught.value.key == "bad"


def test_all_bad_names_are_in_one_error(tmp_path: Path) -> None:
    weight_map = {f"k{i}": f"../{i}" for i in range(30)}
    with pytest.raises(IndexFileError, match=r"k0: (.|\n)*k9: (.|\n)*and 20 more"):
        read_index(written(tmp_path, {"weight_map": weight_map}))


@given(st.text(st.sampled_from("./\\~ab\0\ud800:"), max_size=12) | st.text(max_size=12))
@example("a/../../etc")
def test_every_name_is_rejected_or_lies_below_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    path = written(tmp_path_factory.getbasetemp(), {"weight_map": {"key": name}})
    try:
        accepted = read_index(path).weight_map["key"]
    except IndexFileError:
        return
    folder = "/checkpoint/folder"
    there = os.path.normpath(os.path.join(folder, accepted))
    assert there.startswith(folder + "/")
    assert there == os.path.normpath(os.path.join(folder, name))
    os.fsencode(there)


def test_index_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, b"")
    os.truncate(path, index_module.MAX_INDEX_BYTES + 1)
    with pytest.raises(IndexFileError, match="too large"):
        read_index(path)


def test_folder_and_pipe_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(IndexFileError, match="not a regular file"):
            read_index(path)


def test_absent_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="No such file"):
        read_index(tmp_path / "none.json")
