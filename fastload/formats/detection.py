"""Which reader a weight file is for."""

from __future__ import annotations

import os

from fastload.errors import UnreadableFileError
from fastload.formats.specs import FileContents

__all__ = ["DCP_METADATA", "DCP_SUFFIX", "read_file"]

#: What torch.distributed.checkpoint calls the files of its folders.
DCP_METADATA, DCP_SUFFIX = ".metadata", ".distcp"

_PEEK_BYTES = 16


def read_file(path: str, descriptor: int | None = None) -> FileContents:
    """What a weight file holds, whichever format it is in.

    The name decides where it says ``.safetensors``; otherwise the bytes do: a safetensors file has a JSON object at
    byte 8, which no zip, pickle or tar has there after a plausible length.

    Args:
        path: the file.
        descriptor: the file, if it is open already; it stays open. On a file system that many ranks share, each
            opening is a question to its server.
    """
    if path.endswith(".safetensors") or _looks_like_safetensors(path, descriptor):
        from fastload.formats.safetensors import read_header

        return read_header(path, descriptor)
    from fastload.formats.torch_bin import read_bin

    return read_bin(path)


def _looks_like_safetensors(path: str, descriptor: int | None) -> bool:
    try:
        if descriptor is not None:
            head = os.pread(descriptor, _PEEK_BYTES, 0)
        else:
            with open(path, "rb") as file:
                head = file.read(_PEEK_BYTES)
    except OSError as error:
        raise UnreadableFileError(
            "a weight file cannot be read",
            file=path,
            found=error.strerror,
            fix="check that it exists and may be read",
        ) from error
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32
