"""The zip archive around a torch checkpoint: where its entries lie in the file.

torch writes entries without compression, the bytes of each storage aligned to 64 bytes by padding in the extra field
of the local header, so that a storage is a plain region of the file. The directory is read here rather than by
``zipfile`` because a checkpoint can have 20,000 entries, and because it is not to be believed: names that occur
twice, entries that overlap, and local headers that disagree with the directory are how one file shows different
contents to different readers.

Format: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3; what torch writes: ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterable
from struct import Struct
from typing import Final, NamedTuple

from fastload.errors import ArchiveError, FormatError
from fastload.formats.specs import Encoding, Region
from fastload.formats.torch_source import Source

__all__ = ["Directory", "ZipStorages", "read_directory", "read_entry"]

_END = Struct("<4sHHHHIIH")
_END64_LOCATOR = Struct("<4sIQI")
_END64 = Struct("<4sQHHIIQQQQ")
_CENTRAL = Struct("<I4xHH4xIIIHHHH6xI")
_LOCAL = Struct("<I2xHH4xIIIHH")
_EXTRA = Struct("<HH")
_CENTRAL_SIGNATURE: Final = 0x02014B50
_LOCAL_SIGNATURE: Final = 0x04034B50
_MAX_COMMENT: Final = 0xFFFF
_MAX_DIRECTORY_BYTES: Final = 256 << 20
_ENCRYPTED_OR_PATCHED: Final = 0x2061  # flag bits 0, 5, 6 and 13
_SIZES_FOLLOW: Final = 0x0008  # sizes of the local header are zero, and given after the data
_STORED, _DEFLATED = 0, 8
_MAX_DEFLATE_RATIO: Final = 1032  # 258 bytes for two bits (RFC 1951); memory of the decoded size is asked for at once
_ZIP64: Final = 0xFFFFFFFF
# A window doubles while small entries go on: a lone bias between matrices does not cost a long read.
_SMALLEST_WINDOW_BYTES, _LARGEST_WINDOW_BYTES = 4 << 10, 256 << 10
_DENSE_BYTES: Final = 16 << 10
_new: Final = tuple.__new__


class Entry(NamedTuple):
    """One entry of the directory. Sizes and offsets in bytes.

    Attributes:
        header_offset: where its local header begins.
        name: as in the directory.
        method: 0 for stored, 8 for deflated.
        crc32: of the decoded bytes; torch can be told to leave it zero.
        n_encoded: length in the file.
        n_decoded: length when decoded.
    """

    header_offset: int
    name: bytes
    method: int
    crc32: int
    n_encoded: int
    n_decoded: int


# An Entry that is a plain tuple: the garbage collector soon stops looking at those, and there can be 100,000.
_Row = tuple[int, bytes, int, int, int, int]


class Directory:
    """The entries of an archive, sorted by their place in the file.

    Attributes:
        rows: by name.
        limits: where the next thing in the file begins, in the order of `rows`.
    """

    __slots__ = ("limits", "rows", "source")

    def __init__(self, source: Source, rows: list[_Row], directory_offset: int) -> None:
        rows.sort()
        self.source = source
        self.rows = {row[1]: row for row in rows}
        self.limits = [row[0] for row in rows[1:]]
        self.limits.append(directory_offset)
        if len(self.rows) != len(rows):
            twice = next(row for row in rows if self.rows[row[1]] is not row)
            raise _damaged(source, "two entries have one name", twice[1])

    def __contains__(self, name: bytes) -> bool:
        return name in self.rows

    def entry(self, name: bytes) -> Entry:
        return Entry(*self.rows[name])

    def data_offset(self, name: bytes) -> int:
        """Where the bytes of one entry begin, once its local header is seen to agree with the directory."""
        row = self.rows[name]
        index = bisect_right(self.limits, row[0])
        if index == len(self.limits):
            raise self._overlap(name, self.limits[-1])
        limit = self.limits[index]
        return self._data_offsets([(row, limit)], name)[name]

    def data_offsets(self, prefix: bytes) -> dict[bytes, int]:
        """The same for all entries whose names begin with `prefix`; ArchiveError where any two entries overlap."""
        return self._data_offsets(zip(self.rows.values(), self.limits, strict=True), prefix)

    def _data_offsets(self, rows: Iterable[tuple[_Row, int]], prefix: bytes) -> dict[bytes, int]:
        source, window, window_offset, n_window = self.source, b"", 0, _SMALLEST_WINDOW_BYTES
        unpack, header_size = _LOCAL.unpack_from, _LOCAL.size
        found = {}
        for (header, name, method, _, n_encoded, n_decoded), limit in rows:
            n_header = header_size + len(name)
            if header + n_header + n_encoded > limit:
                raise self._overlap(name, limit)
            if not name.startswith(prefix):
                continue
            pos = header - window_offset
            if pos + n_header > len(window):
                # One read for many small entries; nothing but the header where the data is large.
                n_bytes = n_header
                if limit - header < _DENSE_BYTES:
                    n_bytes = max(n_bytes, min(n_window, source.n_bytes - header))
                    n_window = min(2 * n_window, _LARGEST_WINDOW_BYTES)
                else:
                    n_window = _SMALLEST_WINDOW_BYTES
                window, window_offset, pos = source.read(header, n_bytes), header, 0
            fields = unpack(window, pos)
            signature, flags, local_method, _, n_local_encoded, n_local_decoded, n_name, n_extra = fields
            if (
                signature != _LOCAL_SIGNATURE
                or local_method != method
                or flags & _ENCRYPTED_OR_PATCHED
                or n_name != len(name)
                or window[pos + header_size : pos + n_header] != name
            ):
                raise _damaged(source, "the header of an entry contradicts the directory", name)
            start = header + n_header + n_extra
            if start + n_encoded > limit:
                raise self._overlap(name, limit)
            if n_local_encoded or n_local_decoded or not flags & _SIZES_FOLLOW:
                sizes = _local_sizes(source, name, start - n_extra, n_extra, n_local_encoded, n_local_decoded)
                if sizes != (n_encoded, n_decoded):
                    raise _damaged(
                        source, "the header of an entry gives other sizes", name, (n_encoded, n_decoded), sizes
                    )
            found[name] = start
        return found

    def _overlap(self, name: bytes, limit: int) -> ArchiveError:
        return _damaged(self.source, "entries overlap, or lie outside of the file", name, f"an end before byte {limit}")


def read_directory(source: Source) -> Directory:
    """All entries of an archive; ArchiveError where the directory is damaged or contradicts itself."""
    offset, n_bytes, n_entries = _find_directory(source)
    data = source.read(offset, n_bytes)
    rows = []
    pos = 0
    unpack, size = _CENTRAL.unpack_from, _CENTRAL.size
    for _ in range(n_entries):
        if pos + size > n_bytes:
            raise _damaged(source, "its directory is shorter than the number of its entries asks for")
        fields = unpack(data, pos)
        signature, flags, method, crc32, n_encoded, n_decoded, n_name, n_extra, n_comment, disk, header = fields
        name_end = pos + size + n_name
        name = data[pos + size : name_end]
        pos = name_end + n_extra + n_comment
        if signature != _CENTRAL_SIGNATURE or pos > n_bytes or disk:
            raise _damaged(source, "its directory is not a list of entries")
        if n_encoded == _ZIP64 or n_decoded == _ZIP64 or header == _ZIP64:
            extra = data[name_end : name_end + n_extra]
            n_decoded, n_encoded, header = _zip64(source, extra, name, (n_decoded, n_encoded, header))
        if flags & _ENCRYPTED_OR_PATCHED or (method != _STORED and method != _DEFLATED):
            raise _unusual(source, name, flags, method)
        if method == _STORED and n_encoded != n_decoded:
            raise _damaged(source, "an uncompressed entry has two sizes", name, n_decoded, n_encoded)
        if method == _DEFLATED and n_decoded > _MAX_DEFLATE_RATIO * n_encoded:
            raise _damaged(source, "an entry is larger than what is compressed can be", name, None, n_decoded)
        rows.append((header, name, method, crc32, n_encoded, n_decoded))
    if pos != n_bytes:
        raise _damaged(source, "its directory is longer than its entries")
    return Directory(source, rows, offset)


def _find_directory(source: Source) -> tuple[int, int, int]:
    """Offset, size and number of entries of the central directory."""
    n_tail = min(source.n_bytes, _END.size + _MAX_COMMENT)
    tail_offset = source.n_bytes - n_tail
    tail = source.read(tail_offset, n_tail)
    pos = tail.rfind(b"PK\5\6")
    while pos >= 0 and not (pos + _END.size <= n_tail and pos + _END.size + _END.unpack_from(tail, pos)[7] == n_tail):
        pos = tail.rfind(b"PK\5\6", 0, pos)
    if pos < 0:
        raise source.truncated("a zip archive, which ends with its directory")
    _, disk, directory_disk, n_here, n_entries, n_bytes, offset, _ = _END.unpack_from(tail, pos)
    end = tail_offset + pos
    locator_offset = end - _END64_LOCATOR.size
    if locator_offset >= 0:
        magic, end64_disk, end64_offset, _ = _END64_LOCATOR.unpack(source.read(locator_offset, _END64_LOCATOR.size))
        if magic == b"PK\6\7":
            if end64_offset + _END64.size > locator_offset:
                raise _damaged(source, "its 64-bit end record is not where it is said to be")
            record = _END64.unpack(source.read(end64_offset, _END64.size))
            magic, _, _, _, disk, directory_disk, n_here, n_entries, n_bytes, offset = record
            if magic != b"PK\6\6" or end64_disk:
                raise _damaged(source, "its 64-bit end record is not where it is said to be")
            end = end64_offset
    if disk or directory_disk or n_here != n_entries:
        raise _damaged(source, "it is one part of an archive of several")
    if offset + n_bytes > end or n_entries * _CENTRAL.size > n_bytes or n_bytes > _MAX_DIRECTORY_BYTES:
        raise _damaged(
            source, "its directory does not fit into it", None, f"an end before byte {end}", offset + n_bytes
        )
    return offset, n_bytes, n_entries


def _zip64(source: Source, extra: bytes, name: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
    """Replace the values that are all ones by those of the 64-bit extra field, in its order."""
    pos = 0
    while pos + _EXTRA.size <= len(extra):
        kind, size = _EXTRA.unpack_from(extra, pos)
        pos += _EXTRA.size
        if kind == 1:
            field = extra[pos : pos + size]
            result = []
            for value in values:
                if value == _ZIP64:
                    if len(field) < 8:
                        break
                    value, field = int.from_bytes(field[:8], "little"), field[8:]
                result.append(value)
            if len(result) == len(values):
                return tuple(result)
            break
        pos += size
    raise _damaged(source, "an entry lacks its 64-bit sizes", name)


def _local_sizes(
    source: Source, name: bytes, extra_offset: int, n_extra: int, n_encoded: int, n_decoded: int
) -> tuple[int, int]:
    if _ZIP64 in (n_encoded, n_decoded):
        extra = source.read(extra_offset, n_extra)
        n_decoded, n_encoded = _zip64(source, extra, name, (n_decoded, n_encoded))
    return n_encoded, n_decoded


def read_entry(directory: Directory, name: bytes, max_bytes: int) -> bytes:
    """The decoded bytes of a small entry; ArchiveError where they are damaged or more than `max_bytes`."""
    source, entry = directory.source, directory.entry(name)
    # 64 times is more than a pickle of any checkpoint shrinks, and less than a bomb needs.
    if entry.n_encoded > max_bytes or entry.n_decoded > min(max_bytes, max(1 << 20, 64 * entry.n_encoded)):
        raise _damaged(source, "an entry is too large to be what it should be", entry.name, max_bytes, entry.n_decoded)
    raw = source.read(directory.data_offset(name), entry.n_encoded)
    if entry.method == _STORED:
        return raw  # its checksum is not looked at: torch.serialization.set_crc32_options(False) leaves it zero
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = decoder.decompress(raw, entry.n_decoded + 1)
    except zlib.error as error:
        raise _damaged(source, f"an entry cannot be decompressed ({error})", entry.name) from error
    if len(data) != entry.n_decoded or zlib.crc32(data) != entry.crc32:
        raise _damaged(source, "an entry is not what its checksum says", entry.name)
    return data


class ZipStorages:
    """The storages of a torch archive: the entries ``<archive>/data/<key>``."""

    def __init__(self, directory: Directory, archive: bytes, *, big_endian: bool) -> None:
        self._source = directory.source
        self._rows = directory.rows
        self._prefix = archive + b"/data/"
        self._offsets = directory.data_offsets(self._prefix)
        self._big_endian = big_endian

    def region(self, key: str, n_bytes: int, swap_bytes: int) -> Region:
        """See Storages."""
        name = self._prefix + key.encode("utf-8", "replace")
        offset = self._offsets.get(name)
        if offset is None:
            return self._absent(name, n_bytes)
        _, _, method, crc32, n_encoded, n_decoded = self._rows[name]
        if n_decoded != n_bytes:
            raise _damaged(
                self._source, "a storage has not the size that the pickle gives it", name, n_bytes, n_decoded
            )
        encoding = None
        if (method == _DEFLATED or self._big_endian) and n_bytes:
            swap = swap_bytes if self._big_endian else 1
            if method == _DEFLATED:
                encoding = Encoding("deflate", n_encoded, crc32, swap)
            elif swap > 1:
                encoding = Encoding("none", n_bytes, None, swap)
        return _new(Region, (self._source.file, self._source.begin_bytes + offset, n_bytes, encoding))

    def _absent(self, name: bytes, n_bytes: int) -> Region:
        if n_bytes == 0:
            return Region(self._source.file, 0, 0)  # an empty storage need not have an entry
        raise FormatError(
            "the bytes of a tensor are not in the file",
            file=self._source.file,
            expected=f"a zip entry {_name(name)!r}",
            fix="copy or download the file again",
        )


def _name(name: bytes) -> str:
    return name[:200].decode("utf-8", "replace")


def _damaged(
    source: Source, problem: str, name: bytes | None = None, expected: object = None, found: object = None
) -> ArchiveError:
    return ArchiveError(
        f"the zip archive is damaged or lies: {problem}",
        file=source.file,
        key=None if name is None else _name(name),
        expected=expected,
        found=found,
        fix="copy or download the file again, from where it can be trusted",
    )


def _unusual(source: Source, name: bytes, flags: int, method: int) -> ArchiveError:
    return ArchiveError(
        "an entry of the zip archive is encrypted or compressed in a way that is not known",
        file=source.file,
        key=_name(name),
        expected="stored or deflated entries, not encrypted",
        found=f"method {method}, flags {flags:#06x}",
        fix="unpack the archive and zip it again without compression",
    )
