"""Files whose tensors are read into memory of their own, instead of standing on a mapping.

For file systems where a page fault is dear, because it asks a server for little at a time and waits: here many large
reads are under way at once. The tensors cannot be pulled from under the process either, as the pages of a mapping can
(SIGBUS) when the server goes away.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from fastload.dtypes import to_torch
from fastload.errors import TruncatedFileError, UnreadableFileError
from fastload.formats.runs import runs_of
from fastload.formats.specs import Region, TensorSpec
from fastload.storage.decoding import decode
from fastload.storage.mapping import MappedFile, open_unchanged

__all__ = ["ReadFile"]

_READ_BYTES = 4 << 20
_BATCH_BYTES = 1 << 20
_N_READERS = 8


class _Read(NamedTuple):
    """Bytes to be read: where they are in the file, and where they go."""

    offset_bytes: int
    destination: memoryview


class ReadFile(MappedFile):
    """One file; makes tensors of its regions that own their memory. Safe to be used by several threads.

    Args:
        path: the file.
        n_file_bytes: its size when its header was read. A file that has become shorter since is an error.
        modified_ns: when it was modified last, as it said then; None not to compare that.

    Raises:
        UnreadableFileError, TruncatedFileError, ChangedFileError: as `MappedFile`.
    """

    def __init__(self, path: str, n_file_bytes: int, modified_ns: int | None = None) -> None:
        self.path = path
        self._descriptor: int = open_unchanged(path, n_file_bytes, modified_ns)
        weakref.finalize(self, os.close, self._descriptor)
        self._held: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        self._lock = threading.Lock()

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """The tensor of a spec, read now unless `fill` has. Raises UnreadableFileError, TruncatedFileError."""
        at = _place(spec)
        storage = self._held.get(at)
        if storage is None:
            storage = self._read_storages([spec])[at]
            with self._lock:
                storage = self._held.setdefault(at, storage)
        if spec.view is not None:
            return storage.as_strided(spec.shape, spec.view.stride, spec.view.offset)
        return storage.view(spec.shape)

    def tensors(self, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
        """The tensors of specs, read together."""
        self.fill(specs)
        return [self.tensor(spec) for spec in specs]

    def fill(self, specs: Iterable[TensorSpec]) -> None:
        """Read the storages of many tensors at once, those that lie first in the file first. Raises as `tensor`."""
        missing = [spec for spec in specs if _place(spec) not in self._held]
        self._held |= self._read_storages(sorted(missing, key=lambda spec: spec.region[:2]))

    def part(self, spec: TensorSpec, into: torch.Tensor | None = None) -> torch.Tensor:
        """A part of a tensor whose rows lie apart, read into memory of its own. Raises as `tensor`.

        Args:
            spec: the part.
            into: a flat tensor of so many bytes as its runs have, to be read into.
        """
        if spec.region.encoding is not None:
            return self.tensor(spec)
        runs = runs_of(spec)
        if into is None:
            into = torch.empty(runs.n_read_bytes, dtype=torch.uint8, device="cpu")
        storage = into.view(to_torch(spec.dtype))
        if runs.n_read_bytes:
            # The kernel asks a server for more of them at once than there are readers.
            self.ask_for(runs)
            held = _bytes_of(storage)
            begins = range(0, runs.n_read_bytes, runs.n_bytes)
            self._read([_Read(at, held[b : b + runs.n_bytes]) for at, b in zip(runs.offsets(), begins, strict=True)])
        return storage.as_strided(spec.shape, runs.stride)

    def release(self, region: Region) -> None:
        """Let go of a region; its memory is freed with the last tensor made of it."""
        with self._lock:
            for at in [at for at in self._held if at[0] == region.offset_bytes]:
                del self._held[at]

    def check(self) -> None:
        """Nothing: a file that was cut is met by reading it."""

    def stop_reading_around(self) -> None:
        """Nothing: there is no mapping."""

    def _read_storages(self, specs: Iterable[TensorSpec]) -> dict[tuple[int, int, torch.dtype], torch.Tensor]:
        storages: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        reads: list[_Read] = []
        encoded: list[tuple[TensorSpec, bytearray]] = []
        for spec in specs:
            at = offset, n_bytes, dtype = _place(spec)
            if at in storages:
                continue
            storages[at] = torch.empty(n_bytes // spec.dtype.itemsize, dtype=dtype, device="cpu")
            if not n_bytes:
                continue
            if spec.region.encoding is None:
                reads.append(_Read(offset, _bytes_of(storages[at])))
            else:
                raw = bytearray(spec.region.encoding.n_bytes)
                reads.append(_Read(offset, memoryview(raw)))
                encoded.append((spec, raw))
        self._read(reads)
        for spec, raw in encoded:
            decode(raw, spec.region._replace(offset_bytes=0), _bytes_of(storages[_place(spec)]))
        return storages

    def _read(self, reads: list[_Read]) -> None:
        pieces = [
            _Read(offset + begin, destination[begin : begin + _READ_BYTES])
            for offset, destination in reads
            for begin in range(0, len(destination), _READ_BYTES)
        ]
        batches = list(_batches(pieces))
        if len(batches) < 2:
            for batch in batches:
                self._read_batch(batch)
            return
        with ThreadPoolExecutor(min(_N_READERS, len(batches)), "fastload-read") as readers:
            # Joining the results raises what a reader raised.
            list(readers.map(self._read_batch, batches))

    def _read_batch(self, batch: Sequence[_Read]) -> None:
        for piece in batch:
            self._read_piece(piece)

    def _read_piece(self, piece: _Read) -> None:
        offset, destination = piece
        while len(destination):
            try:
                n = os.preadv(self._descriptor, [destination], offset)
            except OSError as error:
                raise UnreadableFileError(
                    "a weight file cannot be read", file=self.path, found=error.strerror
                ) from error
            if n == 0:
                raise TruncatedFileError.since_opened(self.path, offset + len(destination), offset)
            offset, destination = offset + n, destination[n:]


def _batches(reads: Iterable[_Read]) -> Iterator[list[_Read]]:
    """Reads for one thread to do one after another: small ones together."""
    batch: list[_Read] = []
    n_bytes = 0
    for read in reads:
        if batch and n_bytes + len(read.destination) > _BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
        batch.append(read)
        n_bytes += len(read.destination)
    if batch:
        yield batch


def _place(spec: TensorSpec) -> tuple[int, int, torch.dtype]:
    return spec.region.offset_bytes, spec.region.n_bytes, to_torch(spec.dtype)


def _bytes_of(storage: torch.Tensor) -> memoryview:
    data: memoryview = storage.view(torch.uint8).numpy().data
    return data
