"""Bytes that are not kept as a tensor needs them: compressed zip entries and big-endian storages."""

from __future__ import annotations

import mmap
import zlib

import numpy as np

from fastload.errors import ArchiveError
from fastload.formats.specs import Region

__all__ = ["decode"]

_CHUNK_BYTES = 1 << 20


def decode(source: mmap.mmap | bytearray, region: Region, destination: memoryview) -> None:
    """Write the decoded bytes of a region to destination, which has exactly region.n_bytes.

    Decompression stops at that length whatever the stream claims, so a small file cannot ask for unbounded memory.
    ArchiveError where the stream is damaged, ends early, goes on, or has another checksum than the archive says.
    """
    encoding = region.encoding
    assert encoding is not None
    with memoryview(source)[region.offset_bytes : region.offset_bytes + encoding.n_bytes] as encoded:
        if encoding.compression == "deflate":
            _inflate(encoded, region, destination)
        else:
            destination[:] = encoded
    if encoding.crc32 is not None and zlib.crc32(destination) != encoding.crc32:
        raise _damaged(region, f"checksum {encoding.crc32:08x}", f"{zlib.crc32(destination):08x}")
    if encoding.swap_bytes > 1:
        np.frombuffer(destination, dtype=f"u{encoding.swap_bytes}").byteswap(inplace=True)


def _inflate(encoded: memoryview, region: Region, destination: memoryview) -> None:
    stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    done = 0
    pending: bytes | memoryview = encoded
    try:
        while not stream.eof:
            # One byte more than fits is asked for, so that a stream that goes on is noticed.
            chunk = stream.decompress(pending, min(_CHUNK_BYTES, region.n_bytes - done + 1))
            if done + len(chunk) > region.n_bytes:
                raise _damaged(region, f"{region.n_bytes} bytes", "more")
            destination[done : done + len(chunk)] = chunk
            done += len(chunk)
            pending = stream.unconsumed_tail
            if not chunk and not pending:
                break
    except zlib.error as error:
        raise _damaged(region, "a deflate stream", str(error)) from error
    if done != region.n_bytes:
        raise _damaged(region, f"{region.n_bytes} bytes", f"{done} bytes")


def _damaged(region: Region, expected: str, found: str) -> ArchiveError:
    return ArchiveError(
        f"the compressed entry at byte {region.offset_bytes} is damaged",
        file=region.file,
        expected=expected,
        found=found,
        fix="fetch or save the file again",
    )
