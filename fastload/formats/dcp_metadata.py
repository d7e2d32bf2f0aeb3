"""The ``.metadata`` of a folder that torch.distributed.checkpoint wrote: which tensor lies where, in chunks.

It is a pickle of the dataclasses in ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py``. torch's own
reader hands it to ``pickle.load``, which does whatever a file says. Here it goes through the machine of torch_pickle,
which knows these classes by name only, and what comes out is checked before anything is made of it.
"""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

from fastload.dtypes import DType
from fastload.errors import FormatError, UnknownDtypeError
from fastload.formats.torch_pickle import load_pickle
from fastload.formats.torch_source import open_source
from fastload.formats.torch_stubs import GLOBALS, ClassStub, InstanceStub, Rebuild

__all__ = ["Chunk", "ChunkedTensor", "read_metadata"]

_MAX_METADATA_BYTES: Final = 256 << 20
# A pickle can hand in one tuple or list any number of times, at two bytes each.
_MAX_DIMENSIONS: Final = 64
_MAX_NESTING: Final = 64
_CLASSES: Final = "torch.distributed.checkpoint.metadata"
_IGNORED: Final = Rebuild("ignored", lambda *_: None)
_NAMES: Final[dict[tuple[str, str], object]] = {
    **GLOBALS,
    **{
        (_CLASSES, name): ClassStub(name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): ClassStub("_StorageInfo"),
    (_CLASSES, "_MEM_FORMAT_ENCODING"): _IGNORED,
    # The folder that was written to.
    **{(home, f"{kind}Path"): _IGNORED for home in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")},
}


# Key -> offset of a chunk -> (name of the file, offset and length in bytes).
_Places: TypeAlias = dict[str, dict[tuple[int, ...], tuple[str, int, int]]]


class Chunk(NamedTuple):
    """A box of a tensor, and the bytes that hold it.

    Attributes:
        offset: where it begins in the tensor, along each dimension.
        shape: its size there.
        file: name of the file in the folder.
        offset_bytes: where its record begins in the file.
        n_bytes: length of the record, which is what ``torch.save`` wrote of the chunk.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset_bytes: int
    n_bytes: int


class ChunkedTensor(NamedTuple):
    """A tensor of the folder.

    Attributes:
        key: its name in the folder.
        path: the keys of the nested dicts that it was in when it was saved, and its own; None where that is not told.
        dtype: type of its elements.
        shape: its shape.
        chunks: what it was saved in, in no particular order.
    """

    key: str
    path: tuple[str | int, ...] | None
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_metadata(path: str) -> list[ChunkedTensor]:
    """The tensors that a ``.metadata`` lists. What is not a tensor is passed over.

    Raises:
        UnreadableFileError: it cannot be opened or read.
        UnsafePickleError: it asks for code, or for anything else that this needs not.
        UnknownDtypeError: a tensor is of a type that no checkpoint format holds.
        FormatError: it is damaged, contradicts itself, or names files outside of its folder.
    """
    with open_source(path) as source:
        if source.n_bytes > _MAX_METADATA_BYTES:
            _refuse(path, "it is too large", expected=f"at most {_MAX_METADATA_BYTES} bytes", found=source.n_bytes)
        root, _ = load_pickle(
            source.read(0, source.n_bytes), 0, path, lambda _: _refuse(path, "it refers to storages"), _NAMES
        )
    fields = _fields(path, root, "Metadata")
    tensors, paths = fields.get("state_dict_metadata"), fields.get("planner_data")
    places = _places(path, fields.get("storage_data"))
    if type(tensors) is not dict:
        _refuse(path, "it has no list of tensors", found=type(tensors).__name__)
    return [
        _tensor(path, key, _fields(path, stored, "TensorStorageMetadata"), paths, places)
        for key, stored in tensors.items()
        if not (type(stored) is InstanceStub and stored.kind == "BytesStorageMetadata")
    ]


def _tensor(
    file: str,
    key: object,
    stored: dict[Any, Any],
    paths: object,
    places: _Places,
) -> ChunkedTensor:
    if type(key) is not str:
        _refuse(file, "the name of a tensor is not a string", found=type(key).__name__)
    properties = stored.get("properties")
    state = properties.state if type(properties) is InstanceStub and properties.kind == "TensorProperties" else None
    if type(state) is not tuple or not state:
        _refuse(file, "a tensor has no type", key)
    dtype = state[0]
    if type(dtype) is not DType:
        raise UnknownDtypeError(
            "a tensor is of a type that no checkpoint format holds",
            file=file,
            key=key[:200],
            found=f"torch.{dtype[:80]}" if type(dtype) is str else type(dtype).__name__,
            fix="load the folder with torch.distributed.checkpoint, convert the tensor and save it again",
        )
    shape, listed = _sizes(file, stored.get("size"), key), stored.get("chunks")
    of_tensor = places.get(key, {})
    if type(listed) is not list or not listed:
        _refuse(file, "a tensor has no chunks", key)
    if len(listed) > len(of_tensor):
        _refuse(file, "it does not say where a chunk is", key, f"{len(listed)} places", len(of_tensor))
    chunks = []
    for entry in listed:
        of_chunk = _fields(file, entry, "ChunkStorageMetadata")
        offset, sizes = _sizes(file, of_chunk.get("offsets"), key), _sizes(file, of_chunk.get("sizes"), key)
        if not len(offset) == len(sizes) == len(shape):
            _refuse(file, "a chunk has other dimensions than its tensor", key, len(shape), (len(offset), len(sizes)))
        if any(begin + size > whole for begin, size, whole in zip(offset, sizes, shape, strict=True)):
            _refuse(file, "a chunk lies outside of its tensor", key, list(shape), (list(offset), list(sizes)))
        place = of_tensor.get(offset)
        if place is None:
            _refuse(file, "it does not say where a chunk is", key, found=f"nothing for the chunk at {list(offset)}")
        chunks.append(Chunk(offset, sizes, *place))
    return ChunkedTensor(key, _path(paths, key), dtype, shape, tuple(chunks))


def _places(file: str, storage_data: object) -> _Places:
    """Where the chunks of tensors are."""
    if type(storage_data) is not dict:
        _refuse(file, "it does not say where the tensors are", found=type(storage_data).__name__)
    places: _Places = {}
    for index, info in storage_data.items():
        index_fields = _fields(file, index, "MetadataIndex")
        key, offset = index_fields.get("fqn"), index_fields.get("offset")
        if offset is None:
            continue  # not a tensor
        fields = _fields(file, info, "_StorageInfo")
        name, begin, length = (fields.get(field) for field in ("relative_path", "offset", "length"))
        if type(name) is not str or not name or name in (os.curdir, os.pardir) or set(name) & set("/\\\0"):
            _refuse(file, "it names a file that is not in its folder", key, "a plain name", repr(name)[:200])
        if type(begin) is not int or type(length) is not int or begin < 0 or length < 0:
            _refuse(file, "the place of a chunk is not a number of bytes", key, found=(begin, length))
        if fields.get("transform_descriptors"):
            _refuse(
                file,
                "its files were compressed or encrypted by an extension",
                key,
                "none",
                repr(fields["transform_descriptors"])[:200],
            )
        if type(key) is not str:
            _refuse(file, "the name of a tensor is not a string", found=type(key).__name__)
        places.setdefault(key, {})[_sizes(file, offset, key)] = (name, begin, length)
    return places


def _path(paths: object, key: str) -> tuple[str | int, ...] | None:
    found = paths.get(key) if type(paths) is dict else None
    if type(found) is not tuple or not 0 < len(found) <= _MAX_NESTING:
        return None
    if not all(type(part) in (str, int) for part in found):
        return None
    return found


def _fields(file: str, instance: object, kind: str) -> dict[Any, Any]:
    """The fields of an instance of a class."""
    if type(instance) is not InstanceStub or instance.kind != kind or type(instance.state) is not dict:
        found = instance.kind if type(instance) is InstanceStub else type(instance).__name__
        _refuse(file, "something is not of the class that it should be", expected=kind, found=found)
    return instance.state


def _sizes(file: str, value: object, key: str | None) -> tuple[int, ...]:
    if (
        type(value) is not tuple
        or len(value) > _MAX_DIMENSIONS
        or not all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    ):
        _refuse(file, "a shape or an offset is not made of whole numbers", key, found=type(value).__name__)
    return value


def _refuse(file: str, what: str, key: object = None, expected: object = None, found: object = None) -> NoReturn:
    raise FormatError(
        f"the metadata of the checkpoint cannot be used: {what}",
        file=file,
        key=key[:200] if type(key) is str else None,
        expected=expected,
        found=found,
        fix="copy the folder again, from where it can be trusted, or save it again with torch.distributed.checkpoint",
    )
