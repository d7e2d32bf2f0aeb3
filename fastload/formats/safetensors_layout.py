"""Laying out a safetensors file: its header, and the place of each tensor (see ``fastload.formats.safetensors``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from fastload.dtypes import DType
from fastload.errors import OptionError, UnknownDtypeError
from fastload.formats.safetensors import CODES, MAX_HEADER_BYTES, METADATA, PREFIX_BYTES

__all__ = ["DATA_ALIGNMENT", "encode_header"]

# Data that starts on a page can be mapped page by page, into a fused parameter too.
DATA_ALIGNMENT = 4096


def encode_header(
    entries: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Lay out a safetensors file.

    Tensors that are whole pages come first, in the order given (a module's order is the order its forward
    reads them in), so that each starts on a page. The others follow by descending item size, then key, so
    that each is aligned to its items. The header is padded with spaces up to the first page of data.

    Args:
        entries: (key, dtype, shape) of each tensor, shape in torch's count of elements.
        metadata: text for ``__metadata__``; None for ``{"format": "pt"}``.

    Returns:
        The first bytes of the file, length prefix and padding included; and the place of each tensor, in
        bytes from the start of the file, ascending. Tensors follow each other without a gap.

    Raises:
        OptionError: a key that no file can hold, or more keys than one file can.
        UnknownDtypeError: a data type that the format does not have.
    """
    sizes = {key: prod(shape) * dtype.itemsize for key, dtype, shape in entries}
    if len(sizes) != len(entries) or METADATA in sizes:
        raise OptionError("a key is given twice, or is reserved", expected=f"each once, none {METADATA!r}")

    def rank(entry: tuple[str, DType, tuple[int, ...]]) -> tuple[bool, int, str]:
        key, dtype, _ = entry
        if sizes[key] and sizes[key] % DATA_ALIGNMENT == 0:
            return False, 0, ""
        return True, -dtype.itemsize, key

    header: dict[str, Any] = {METADATA: dict(metadata) if metadata is not None else {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for key, dtype, shape in sorted(entries, key=rank):
        offsets[key] = position
        end = position + sizes[key]
        counts = _header_shape(key, dtype, shape)
        header[key] = {"dtype": dtype.code, "shape": counts, "data_offsets": [position, end]}
        position = end
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start : error.end])
        raise OptionError("a key or a metadata text is not Unicode", found=found) from None
    n_bytes = -(-(PREFIX_BYTES + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    if n_bytes - PREFIX_BYTES > MAX_HEADER_BYTES:
        raise OptionError(
            "too many tensors for the header of one file",
            expected=f"a header of at most {MAX_HEADER_BYTES:,} bytes",
            found=f"{n_bytes:,} bytes for {len(entries):,} tensors",
            fix="save in smaller shards",
        )
    data = (n_bytes - PREFIX_BYTES).to_bytes(PREFIX_BYTES, "little") + text
    return data.ljust(n_bytes, b" "), {key: n_bytes + offset for key, offset in offsets.items()}


def _header_shape(key: str, dtype: DType, shape: tuple[int, ...]) -> list[int]:
    """The shape as a header counts it; UnknownDtypeError where the format cannot hold the tensor."""
    packed = dtype.elements_per_item
    if dtype.code not in CODES or (packed != 1 and not shape):
        raise UnknownDtypeError(
            "safetensors has no way to hold this tensor",
            key=key,
            found=f"{dtype.torch_name} {list(shape)}",
            fix="convert the tensor, or save as .bin",
        )
    return list(shape) if packed == 1 else [*shape[:-1], shape[-1] * packed]
