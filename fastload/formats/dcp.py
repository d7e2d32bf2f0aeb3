"""Folders of torch.distributed.checkpoint (DCP): ``.metadata``, and ``__<rank>_<n>.distcp`` with chunks of tensors.

Each rank wrote its part of a tensor as a chunk, and each chunk is what ``torch.save`` makes of a tensor: a zip archive
with a pickle and the bare elements, one archive behind the other in a file. So a chunk is a region of a file, and a
tensor of several chunks is fused of them; on how many ranks the folder was written does not matter any more.

Nothing of torch is used to read them: its reader unpickles ``.metadata`` without restriction.
"""

from __future__ import annotations

import os
from math import prod
from operator import attrgetter, mul

from fastload.dtypes import DType
from fastload.errors import FormatError
from fastload.formats.dcp_metadata import Chunk, ChunkedTensor, read_metadata
from fastload.formats.detection import DCP_METADATA
from fastload.formats.specs import FileContents, FusedSpec, Piece, Region, TensorSpec, contiguous_stride
from fastload.formats.torch_bin import NESTED_UNDER, read_tensor
from fastload.formats.torch_source import Source, open_source

__all__ = ["read_folder"]


def read_folder(folder: str) -> tuple[dict[str, FileContents], dict[str, FusedSpec]]:
    """What the files of a folder hold, by path, and the tensors that lie in several chunks, by key.

    Where the dict that was saved has dicts in it, of which one is named as weights are (``{"model": ..., "optim":
    ...}``), its tensors are the weights under the names they have there, and all else is passed over.

    Raises:
        UnreadableFileError: a file cannot be opened or read.
        TruncatedFileError: a file ends before its last chunk.
        UnsafePickleError: a pickle asks for what no state dict needs.
        FormatError: metadata and chunks contradict each other, or the chunks of a tensor are not a grid.
    """
    metadata_file = os.path.join(folder, DCP_METADATA)
    tensors = _weights(read_metadata(metadata_file))
    by_file: dict[str, list[tuple[str, Chunk]]] = {}
    for key, tensor in tensors.items():
        for chunk in _chunks(tensor, metadata_file):
            by_file.setdefault(chunk.file, []).append((key, chunk))
    contents: dict[str, FileContents] = {}
    pieces: dict[str, list[Piece]] = {}
    for name, members in by_file.items():
        path, whole = os.path.join(folder, name), []
        with open_source(path) as source:
            end = 0
            for key, chunk in sorted(members, key=lambda member: member[1].offset_bytes):
                spec, end = _read_chunk(source, key, chunk, tensors[key].dtype, end)
                if chunk.shape == tensors[key].shape:
                    whole.append(spec)
                else:
                    steps = contiguous_stride(tensors[key].shape)
                    begin = sum(map(mul, chunk.offset, steps))
                    pieces.setdefault(key, []).append(Piece(spec, begin, steps))
            contents[path] = FileContents(tuple(whole), {}, source.n_bytes, source.modified_ns)
    fused = {
        key: FusedSpec(key, tensors[key].shape, tuple(sorted(parts, key=attrgetter("offset"))))
        for key, parts in pieces.items()
    }
    return contents, fused


def _weights(tensors: list[ChunkedTensor]) -> dict[str, ChunkedTensor]:
    """The tensors that are weights, by the names that they have in their dict."""
    groups: dict[tuple[str | int, ...], dict[str, ChunkedTensor]] = {}
    for tensor in tensors:
        *holder, name = tensor.path or (0,)
        if holder and holder[-1] in NESTED_UNDER and type(name) is str:
            groups.setdefault(tuple(holder), {})[name] = tensor
    if not groups:
        return {tensor.key: tensor for tensor in tensors}
    return groups[min(groups, key=lambda holder: (len(holder), NESTED_UNDER.index(str(holder[-1]))))]


def _chunks(tensor: ChunkedTensor, file: str) -> list[Chunk]:
    """The chunks of a tensor that hold something, or one of an empty tensor; FormatError if they are not a grid."""
    chunks = [chunk for chunk in tensor.chunks if prod(chunk.shape)]
    if not prod(tensor.shape):
        return [tensor.chunks[0]._replace(offset=(0,) * len(tensor.shape), shape=tensor.shape)]
    # Along each dimension, where a chunk begins and where that chunk ends; what is cut elsewhere too is no grid.
    ends: list[dict[int, int]] = [{} for _ in tensor.shape]
    fits = all(
        end.setdefault(begin, begin + size) == begin + size
        for chunk in chunks
        for end, begin, size in zip(ends, chunk.offset, chunk.shape, strict=True)
    )
    joined = bool(chunks) and all(
        sorted(end) == [0, *sorted(end.values())[:-1]] and max(end.values()) == whole
        for end, whole in zip(ends, tensor.shape, strict=True)
    )
    n_cells = prod(len(end) for end in ends)
    if fits and joined and len({chunk.offset for chunk in chunks}) == len(chunks) == n_cells:
        return chunks
    raise FormatError(
        "the chunks of a tensor do not cover it as a grid, each element once",
        file=file,
        key=tensor.key[:200],
        expected=f"{n_cells} chunks of {list(tensor.shape)}",
        found=f"{len(chunks)}: {', '.join(f'{list(c.shape)} at {list(c.offset)}' for c in chunks[:4])}",
        fix="load the folder with torch.distributed.checkpoint, and save it again",
    )


def _read_chunk(source: Source, key: str, chunk: Chunk, dtype: DType, end_bytes: int) -> tuple[TensorSpec, int]:
    """A chunk as a tensor of its file, and where its record ends there. That of the chunk before ends at end_bytes."""
    if not prod(chunk.shape):
        return TensorSpec(key, dtype, chunk.shape, Region(source.file, 0, 0)), end_bytes
    if chunk.offset_bytes < end_bytes:
        # Whoever reads one record for many chunks can be kept busy for ever.
        raise FormatError(
            "two chunks lie in the same place of a file",
            file=source.file,
            key=key[:200],
            expected=f"one that begins at byte {end_bytes}, or behind it",
            found=chunk.offset_bytes,
            fix="copy the folder again: its files are of different saves",
        )
    if chunk.offset_bytes + chunk.n_bytes > source.n_bytes:
        raise source.truncated(f"a chunk of {key[:200]}, {chunk.n_bytes} bytes at byte {chunk.offset_bytes}")
    spec = read_tensor(source._replace(n_bytes=chunk.n_bytes, begin_bytes=chunk.offset_bytes), key)
    if (spec.dtype, spec.shape) != (dtype, chunk.shape):
        raise FormatError(
            f"a chunk is not what {DCP_METADATA} says",
            file=source.file,
            key=key[:200],
            expected=f"{dtype} {list(chunk.shape)}",
            found=f"{spec.dtype} {list(spec.shape)} at byte {chunk.offset_bytes}",
            fix="copy the folder again: its files are of different saves",
        )
    return spec, chunk.offset_bytes + chunk.n_bytes
