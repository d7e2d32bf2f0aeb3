"""Checksums of the tensors in a safetensors file, kept in its own header.

One text of ``__metadata__``, which readers that do not know it pass over:

    "fastload.checksums": "xxh3-64 16777216 0123456789abcdef 00112233445566778899aabbccddeeff..."

which are the algorithm, the bytes of a block, the checksum of the header, and those of the blocks of all tensors: in
the order of their bytes in the file, each tensor in blocks of its own, so that a flipped bit is placed within 16 MiB
and large tensors are compared by several threads. The header's covers all bytes before the tensors, with zeros in its
own place: names, shapes, offsets, and the checksums themselves. It therefore stands for the whole file, and is what an
index keeps of each shard.

XXH3 (by Yann Collet, through the package xxhash) runs at the speed of memory, and its checksum depends on the order of
the bytes. It finds accidents. It is no proof against somebody who means to deceive: who can change a tensor can change
its checksum too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastload.errors import IntegrityError

__all__ = [
    "BLOCK_BYTES",
    "CHECKSUMS",
    "Checksums",
    "blank_checksums",
    "checksum",
    "n_blocks",
    "read_checksums",
    "seal",
    "unseal",
]

#: The name of the text among a file's metadata.
CHECKSUMS = "fastload.checksums"
BLOCK_BYTES = 16 << 20

_N_DIGITS = 16
_ZEROS = "0" * _N_DIGITS
_BEGINNING = f"xxh3-64 {BLOCK_BYTES} "
_TEXT = re.compile(rf"{_BEGINNING}[0-9a-f]{{{_N_DIGITS}}} ((?:[0-9a-f]{{{_N_DIGITS}}})*)")
# Quotes within a text are escaped, so that this is nowhere else in a header.
_FIELD = re.compile(rf'"{re.escape(CHECKSUMS)}": ?"{_BEGINNING}'.encode())


@dataclass(frozen=True, slots=True)
class Checksums:
    """What a file says its bytes are.

    Attributes:
        header: checksum of the header, which covers the others.
        blocks: those of the tensors' blocks, in the order of the file.
    """

    header: str
    blocks: tuple[str, ...]


def checksum(data: bytes | memoryview) -> str:
    """XXH3 of some bytes, 64 bits, as 16 hexadecimal digits. Other threads run meanwhile."""
    # Here, because who only reads and writes headers has no use for it.
    import xxhash

    digest: str = xxhash.xxh3_64_hexdigest(data)
    return digest


def n_blocks(n_bytes: int) -> int:
    """Number of blocks of a tensor; an empty one has none."""
    return -(-n_bytes // BLOCK_BYTES)


def blank_checksums(sizes: Iterable[int]) -> str:
    """The text, with zeros for all checksums, of a file with tensors of these bytes."""
    return f"{_BEGINNING}{_ZEROS} {_ZEROS * sum(map(n_blocks, sizes))}"


def seal(header: bytes, blocks: Sequence[str]) -> tuple[bytes, str]:
    """Put checksums in the place of zeros.

    Args:
        header: all bytes of the file before its tensors, from ``encode_header``.
        blocks: checksums of the tensors' blocks, in the order of the file.

    Returns:
        The header as it is to be written, and its checksum.
    """
    at = _place(header)
    if at is None:
        raise ValueError("the header has no place for checksums")
    text = "".join(blocks).encode()
    begin = at + _N_DIGITS + 1
    filled = header[:begin] + text + header[begin + len(text) :]
    whole = checksum(filled)
    return filled[:at] + whole.encode() + filled[at + _N_DIGITS :], whole


def unseal(header: bytes) -> bytes:
    """The header with zeros for its checksums, as it was before ``seal``; as it is if it has none."""
    at = _place(header)
    if at is None:
        return header
    end = header.find(b'"', at)
    return header[:at] + bytes(c if c == ord(" ") else ord("0") for c in header[at:end]) + header[end:]


def read_checksums(path: str, header: bytes, metadata: Mapping[str, str], sizes: Sequence[int]) -> Checksums | None:
    """The checksums in a header; None where it has none that this version knows.

    Args:
        path: the file, for errors.
        header: all bytes of the file before its tensors.
        metadata: what the header's ``__metadata__`` says.
        sizes: bytes of each tensor, in the order of the file.

    Raises:
        IntegrityError: the header is not the one that was written.
    """
    text = metadata.get(CHECKSUMS)
    if text is None or not text.startswith(_BEGINNING):
        return None
    match, at = _TEXT.fullmatch(text), _place(header)
    if match is None or at is None or len(match[1]) != _N_DIGITS * sum(map(n_blocks, sizes)):
        raise _rewritten(path, "a checksum of each block of each tensor", "another number of them")
    expected = header[at : at + _N_DIGITS].decode("ascii", "replace")
    found = checksum(header[:at] + _ZEROS.encode() + header[at + _N_DIGITS :])
    if found != expected:
        raise _rewritten(path, f"a header of the checksum {expected}", found)
    digits = match[1]
    return Checksums(expected, tuple(digits[i : i + _N_DIGITS] for i in range(0, len(digits), _N_DIGITS)))


def _place(header: bytes) -> int | None:
    """Where the header's own checksum is."""
    field = _FIELD.search(header)
    return None if field is None else field.end()


def _rewritten(path: str, expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        "the header is not the one that its checksums were made for",
        file=path,
        expected=expected,
        found=found,
        fix="fetch the file again or save it again: it is damaged, or another program wrote it and kept the checksums",
    )
