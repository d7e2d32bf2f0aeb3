"""Are the bytes of a checkpoint's files those that were written?

There are three things to compare with: the checksums that fastload keeps in safetensors headers (of each 16 MiB of a
tensor) and in the index (of each shard's header), the names in a download cache of the hub, which are the SHA-256 of
the files, and the CRC-32 of the entries of a .bin.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence

from fastload.errors import ArchiveError, IntegrityError, OptionError, UnreadableFileError
from fastload.formats.checksums import BLOCK_BYTES, CHECKSUMS, Checksums, read_checksums
from fastload.formats.detection import read_file
from fastload.formats.specs import TensorSpec
from fastload.storage.hashing import file_checksums

__all__ = ["compare_with_archive", "compare_with_checksums", "compare_with_hub_name", "require_integrity"]

_CHUNK_BYTES = 4 << 20
# A file's name in the cache is what the hub calls its content: of large files, their SHA-256.
_BLOB = re.compile(r".*/blobs/(?P<sha256>[0-9a-f]{64})")

Progress = Callable[[int], None]


def require_integrity(files: Sequence[str], headers: Mapping[str, str]) -> None:
    """Compare all bytes of weight files with what was kept of them when they were written.

    Args:
        files: paths.
        headers: path -> checksum of its header, where an index says it.

    Raises:
        IntegrityError: they differ. The first file that does is told, with all its damaged tensors.
        ArchiveError: an entry of a .bin is damaged.
        OptionError: there is nothing to compare a file with.
    """
    for path in files:
        if (
            not compare_with_checksums(path, headers.get(path), _ignore)
            and not compare_with_hub_name(path, _ignore)
            and not compare_with_archive(path, _ignore)
        ):
            raise OptionError(
                "the file cannot be verified: it carries no checksums, and is not in a download cache of the hub",
                file=path,
                fix="save it with fastload once ('fastload convert DIR DIR'), or leave out verify",
            )


def compare_with_checksums(path: str, header: str | None, progress: Progress) -> bool:
    """Compare a safetensors file with the checksums in its header, and that with the index's. False if it has none.

    Args:
        path: the file.
        header: the checksum of its header that an index has; None where there is none.
        progress: called with the number of bytes whenever some were read.

    Raises:
        IntegrityError: they differ. All damaged tensors are told, each with the bytes of the file where it is.
    """
    contents = read_file(path)
    specs = sorted(contents.specs, key=lambda spec: spec.region.offset_bytes)
    checksums = None
    if CHECKSUMS in contents.metadata:
        n_header_bytes = specs[0].region.offset_bytes if specs else contents.n_file_bytes
        sizes = [spec.region.n_bytes for spec in specs]
        checksums = read_checksums(path, _beginning(path, n_header_bytes), contents.metadata, sizes)
    if checksums is None and header is None:
        return False
    if checksums is None or header not in (None, checksums.header):
        raise IntegrityError(
            "the file is not the one that the index was written with",
            file=path,
            expected=f"a header of the checksum {header}",
            found=checksums.header if checksums else "no checksums",
            fix="fetch or save the checkpoint again; its files belong to different saves",
        )
    _compare_blocks(path, specs, checksums, progress)
    return True


def _beginning(path: str, n_bytes: int) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(n_bytes)
    except OSError as error:
        raise UnreadableFileError("a file could not be read", file=path, found=error.strerror) from error


def _ignore(n_bytes: int) -> None:
    """Progress that nobody watches."""


def _compare_blocks(path: str, specs: Sequence[TensorSpec], checksums: Checksums, progress: Progress) -> None:
    blocks = [
        (spec.key, spec.region.offset_bytes + begin, min(BLOCK_BYTES, spec.region.n_bytes - begin))
        for spec in specs
        for begin in range(0, spec.region.n_bytes, BLOCK_BYTES)
    ]
    found = file_checksums(path, [(offset, n_bytes) for _, offset, n_bytes in blocks], progress)
    damaged = [
        (key, f"{key}: {now} in bytes {offset:,} to {offset + n_bytes:,} of the file, where {then} was written")
        for (key, offset, n_bytes), now, then in zip(blocks, found, checksums.blocks, strict=True)
        if now != then
    ]
    if damaged:
        raise IntegrityError(
            "the file is damaged: tensors have other bytes than were written",
            file=path,
            key=", ".join(dict.fromkeys(key for key, _ in damaged)),
            expected="bytes of the checksums in the header",
            found="\n            ".join(line for _, line in damaged),
            fix="fetch the file again, or save it again from a good copy",
        )


def compare_with_hub_name(path: str, progress: Progress) -> bool:
    """Compare a file in a download cache of the hub with its name, its SHA-256. False if it has no such name."""
    real = os.path.realpath(path)
    match = _BLOB.fullmatch(real)
    if match is None:
        return False
    digest = hashlib.sha256()
    try:
        with open(real, "rb", buffering=0) as file:
            buffer = memoryview(bytearray(_CHUNK_BYTES))
            while n_bytes := file.readinto(buffer):
                digest.update(buffer[:n_bytes])
                progress(n_bytes)
    except OSError as error:
        raise UnreadableFileError(
            "a file could not be read to its end",
            file=path,
            found=error.strerror,
            fix="fetch the file again, and look at the health of the disk",
        ) from error
    if digest.hexdigest() != match["sha256"]:
        raise IntegrityError(
            "the file is not the one that the hub has under its name",
            file=path,
            expected=f"SHA-256 {match['sha256']}",
            found=digest.hexdigest(),
            fix=f"delete {real} and fetch it again",
        )
    return True


def compare_with_archive(path: str, progress: Progress) -> bool:
    """Compare the entries of a .bin that is a zip with their CRC-32. False if it is none, or has none.

    Raises:
        ArchiveError: an entry is damaged.
    """
    if path.endswith(".safetensors") or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            # A checksum of zero is none: torch can be told to leave it out.
            entries = [entry for entry in archive.infolist() if entry.CRC]
            for entry in entries:
                with archive.open(entry) as contents:
                    while data := contents.read(_CHUNK_BYTES):
                        progress(len(data))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ArchiveError(
            "an entry of the archive is damaged",
            file=path,
            found=str(error),
            fix="fetch or save the file again",
        ) from error
    return bool(entries)
