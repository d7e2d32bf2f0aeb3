"""Folders of torch.distributed.checkpoint: what is read of them, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

import fastload
from fastload.errors import (
    CheckpointNotFoundError,
    FormatError,
    KeyMatchError,
    OptionError,
    TruncatedFileError,
    UnknownDtypeError,
    UnreadableFileError,
    UnsafePickleError,
)

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "half": torch.linspace(-1, 1, 7).bfloat16(),
    "flags": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j]),
    "float8": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
}


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(state, checkpoint_id=folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(dict(TENSORS), tmp_path / "folder")


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def assert_same(found: Any, wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(found[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


def test_tensors_of_every_type_and_shape_are_read(folder: Path) -> None:
    assert_same(fastload.load_state_dict(folder), TENSORS)
    checkpoint = fastload.open_checkpoint(folder)
    assert checkpoint.format == "dcp"
    assert_same(checkpoint, TENSORS)
    assert torch.equal(checkpoint.slice("a.weight")[1:], TENSORS["a.weight"][1:])


def test_values_that_are_no_tensors_are_passed_over(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "step": 3, "name": "x", "sizes": [1, 2], "when": {"epoch": 1.5}}
    assert_same(fastload.load_state_dict(save(state, tmp_path / "mixed")), {"w": torch.ones(2)})


@pytest.mark.parametrize(
    "nest",
    [
        lambda weights: {"model": weights},
        lambda weights: {"model": weights, "optim": {"state": {"w": {"exp_avg": torch.zeros(3)}}}},
        lambda weights: {"app": {"optim": {"lr": torch.tensor(1.0)}, "model": weights}},
        lambda weights: {"step": torch.tensor(3), "state_dict": weights},
        lambda weights: {"module": weights, "model_ema": {"a.weight": torch.zeros(1)}},
    ],
)
def test_weights_in_a_dict_of_their_own_are_found(tmp_path: Path, nest: Callable[[Any], dict[str, Any]]) -> None:
    assert_same(fastload.load_state_dict(save(nest(dict(TENSORS)), tmp_path / "nested")), TENSORS)


def test_names_with_a_prefix_of_another_kind_are_mapped(tmp_path: Path) -> None:
    linear = torch.nn.Linear(4, 2)
    state = {f"model.{name}": tensor for name, tensor in linear.state_dict().items()}
    folder = save(state, tmp_path / "prefixed")
    with torch.device("meta"):
        other = torch.nn.Linear(4, 2)
    fastload.load_model(other, folder, key_mapping={r"^model\.": ""})
    assert_same(other.state_dict(), linear.state_dict())


def test_an_architecture_is_loaded_from_its_config_and_a_folder_of_ranks(tmp_path: Path) -> None:
    config = fastload.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = fastload.BertModel(config)
    folder = save(model.state_dict(), tmp_path / "bert")
    config.save_pretrained(folder)
    assert_same(fastload.AutoModel.from_pretrained(folder).state_dict(), model.state_dict())


def test_safetensors_in_the_same_folder_are_preferred(folder: Path) -> None:
    fastload.save_state_dict({"other": torch.ones(1)}, folder)
    assert set(fastload.open_checkpoint(folder)) == {"other"}


def test_tensors_outlive_the_checkpoint_and_never_change_its_files(folder: Path) -> None:
    before = (folder / "__0_0.distcp").read_bytes()
    tensors = fastload.load_state_dict(folder)
    for tensor in tensors.values():
        tensor.zero_()
    assert (folder / "__0_0.distcp").read_bytes() == before


# ---- what is refused ----


def test_a_folder_without_metadata_is_refused(folder: Path) -> None:
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"not what says what is in them(.|\n)*\.metadata"):
        fastload.load_state_dict(folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_one_file_of_a_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(OptionError, match="give the folder"):
        fastload.open_checkpoint(folder / name)


class Command:
    """What a pickle runs that is not looked at before it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("place", ["itself", "planner_data", "storage_meta", "storage_data", "a key"])
def test_code_in_the_metadata_is_refused_and_not_run(folder: Path, tmp_path: Path, place: str) -> None:
    trap = Command(tmp_path / "trap")
    path = folder / ".metadata"
    metadata: Any = pickle.loads(path.read_bytes())
    if place == "itself":
        metadata = trap
    elif place == "storage_data":
        metadata.storage_data[MetadataIndex("x")] = trap
    elif place == "a key":
        metadata.state_dict_metadata["x"] = trap
    else:
        setattr(metadata, place, trap)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafePickleError, match=r"code or an object(.|\n)*mkdir"):
        fastload.load_state_dict(folder)
    assert not (tmp_path / "trap").exists()


def test_code_in_a_chunk_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = save({"w": torch.ones(2)}, tmp_path / "folder")
    record = io.BytesIO()
    torch.save(Command(tmp_path / "trap"), record)
    (folder / "__0_0.distcp").write_bytes(record.getvalue())

    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(record.getvalue())

    change_metadata(folder, change)
    with pytest.raises(UnsafePickleError):
        fastload.load_state_dict(folder)
    assert not (tmp_path / "trap").exists()


def test_code_in_a_value_that_is_no_tensor_is_never_read(tmp_path: Path) -> None:
    folder = save({"w": torch.ones(2), "x": Command(tmp_path / "trap")}, tmp_path / "folder")
    assert set(fastload.load_state_dict(folder)) == {"w"}
    assert not (tmp_path / "trap").exists()


def test_a_weight_that_is_listed_as_no_tensor_is_missing(tmp_path: Path) -> None:
    linear = torch.nn.Linear(4, 2)
    folder = save(linear.state_dict(), tmp_path / "folder")
    change_metadata(folder, lambda m: m.state_dict_metadata.update(weight=BytesStorageMetadata()))
    with pytest.raises(KeyMatchError, match="missing in the files: weight"):
        fastload.load_model(linear, folder)


def test_a_file_that_is_cut_is_refused(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TruncatedFileError, match=r"__0_0\.distcp"):
        fastload.load_state_dict(folder)


@pytest.mark.parametrize("n_bytes", [0, 1, 10, 300, 900])
def test_metadata_that_is_cut_is_refused(folder: Path, n_bytes: int) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(FormatError, match=r"\.metadata"):
        fastload.load_state_dict(folder)


def test_a_file_that_is_gone_is_refused(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(UnreadableFileError, match=r"__0_0\.distcp"):
        fastload.load_state_dict(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a/b", "a\\b", "a\0b", 7])
def test_a_file_outside_of_the_folder_is_refused(folder: Path, name: object) -> None:
    def change(metadata: Any) -> None:
        metadata.storage_data[MetadataIndex("half", [0])].relative_path = name

    change_metadata(folder, change)
    with pytest.raises(FormatError, match="names a file that is not in its folder"):
        fastload.load_state_dict(folder)


def test_files_that_an_extension_has_transformed_are_refused(folder: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.storage_data[MetadataIndex("half", [0])].transform_descriptors = ["stream.zstd"]

    change_metadata(folder, change)
    with pytest.raises(FormatError, match=r"compressed or encrypted by an extension(.|\n)*stream\.zstd"):
        fastload.load_state_dict(folder)


def test_a_chunk_that_has_no_place_is_refused(folder: Path) -> None:
    change_metadata(folder, lambda m: m.storage_data.pop(MetadataIndex("half", [0])))
    with pytest.raises(FormatError, match=r"does not say where a chunk is(.|\n)*half"):
        fastload.load_state_dict(folder)


@pytest.mark.parametrize(("field", "value"), [("offset", -1), ("offset", 1.5), ("length", None), ("length", -5)])
def test_a_place_that_is_no_number_of_bytes_is_refused(folder: Path, field: str, value: object) -> None:
    change_metadata(folder, lambda m: setattr(m.storage_data[MetadataIndex("half", [0])], field, value))
    with pytest.raises(FormatError, match="not a number of bytes"):
        fastload.load_state_dict(folder)


def test_a_chunk_of_another_tensor_is_refused(folder: Path) -> None:
    def change(metadata: Any) -> None:
        places = metadata.storage_data
        one, other = MetadataIndex("half", [0]), MetadataIndex("a.weight", [0, 0])
        places[one], places[other] = places[other], places[one]

    change_metadata(folder, change)
    with pytest.raises(FormatError, match=r"a chunk is not what \.metadata says(.|\n)*BF16 \[7\](.|\n)*F32 \[3, 4\]"):
        fastload.load_state_dict(folder)


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [((0, 0), (2, 4))],
        [((0, 0), (3, 4)), ((0, 0), (3, 4))],
        [((0, 0), (2, 4)), ((1, 0), (2, 4))],
        [((0, 0), (1, 4)), ((1, 0), (1, 4)), ((2, 0), (1, 2))],
        [((0, 0), (2, 2)), ((0, 2), (1, 2)), ((1, 2), (2, 2)), ((2, 0), (1, 2))],
        [((0, 0), (2, 4)), ((2, 0), (2, 4))],
        [((0,), (3,))],
    ],
    ids=["none", "too few", "twice", "overlapping", "a hole", "no grid", "outside", "of other dimensions"],
)
def test_chunks_that_do_not_make_their_tensor_are_refused(folder: Path, chunks: list[Any]) -> None:
    def change(metadata: Any) -> None:
        place = metadata.storage_data[MetadataIndex("a.weight", [0, 0])]
        metadata.state_dict_metadata["a.weight"].chunks = [
            ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset, sizes in chunks
        ]
        metadata.storage_data.update({MetadataIndex("a.weight", offset): place for offset, _ in chunks})

    change_metadata(folder, change)
    with pytest.raises(FormatError, match=r"chunk(.|\n)*a\.weight"):
        fastload.load_state_dict(folder)


def test_a_tensor_that_is_said_to_be_huge_takes_no_memory(folder: Path) -> None:
    def change(metadata: Any) -> None:
        stored = metadata.state_dict_metadata["half"]
        stored.size = torch.Size([2**60])
        stored.chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([2**60]))]

    change_metadata(folder, change)
    with pytest.raises(FormatError, match="a chunk is not what"):
        fastload.load_state_dict(folder)


def test_chunks_in_one_place_are_refused(folder: Path) -> None:
    def change(metadata: Any) -> None:
        places = metadata.storage_data
        places[MetadataIndex("half", [0])].offset = places[MetadataIndex("a.weight", [0, 0])].offset

    change_metadata(folder, change)
    with pytest.raises(FormatError, match=r"two chunks lie in the same place(.|\n)*__0_0\.distcp"):
        fastload.load_state_dict(folder)


def test_a_list_that_is_handed_in_a_thousand_times_is_not_read_as_often(folder: Path) -> None:
    def change(metadata: Any) -> None:
        stored = metadata.state_dict_metadata["half"]
        stored.chunks = stored.chunks * 100_000
        metadata.state_dict_metadata.update({f"half.{number}": stored for number in range(1_000)})

    change_metadata(folder, change)
    begin = time.process_time()
    with pytest.raises(FormatError, match="does not say where a chunk is"):
        fastload.load_state_dict(folder)
    assert time.process_time() - begin < 5.0  # a hundred million steps take minutes


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_bytes_that_were_changed_are_read_or_refused_and_nothing_else(folder: Path, name: str) -> None:
    path, random = folder / name, Random(0)
    whole = path.read_bytes()
    n_refused = 0
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            at = random.randrange(len(changed))
            changed[at : at + random.randint(0, 3)] = random.randbytes(random.randint(0, 3))
        path.write_bytes(changed)
        try:
            fastload.open_checkpoint(folder)
        except fastload.FastloadError as error:
            assert error.file is not None  # noqa: PT017
            n_refused += 1
    assert n_refused > 50


def test_a_type_that_no_format_has_is_refused(folder: Path) -> None:
    change_metadata(folder, lambda m: setattr(m.state_dict_metadata["half"].properties, "dtype", torch.complex32))
    with pytest.raises(UnknownDtypeError, match="complex32"):
        fastload.load_state_dict(folder)


@pytest.mark.parametrize("field", ["state_dict_metadata", "storage_data"])
def test_metadata_without_its_parts_is_refused(folder: Path, field: str) -> None:
    change_metadata(folder, lambda metadata: setattr(metadata, field, None))
    with pytest.raises(FormatError, match="the metadata of the checkpoint cannot be used"):
        fastload.load_state_dict(folder)


def test_an_object_of_the_wrong_class_is_refused(folder: Path) -> None:
    change_metadata(folder, lambda m: m.state_dict_metadata.update(half=m.state_dict_metadata["half"].chunks[0]))
    with pytest.raises(FormatError, match=r"not of the class(.|\n)*TensorStorageMetadata(.|\n)*ChunkStorageMetadata"):
        fastload.load_state_dict(folder)


def test_a_pickle_that_is_no_metadata_is_refused(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FormatError, match=r"not of the class(.|\n)*dict"):
        fastload.load_state_dict(folder)


def test_keys_that_do_not_fit_the_module_are_named(folder: Path) -> None:
    with pytest.raises(KeyMatchError, match=r"missing in the files: bias(.|\n)*not in the model: a\.weight"):
        fastload.load_model(torch.nn.Linear(4, 2), folder)


def test_there_are_no_checksums_to_verify(folder: Path) -> None:
    with pytest.raises(OptionError, match="no checksums"):
        fastload.load_state_dict(folder, verify=True)
