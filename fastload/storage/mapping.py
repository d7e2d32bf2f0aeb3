"""Files mapped into memory, and tensors that stand on them.

A mapping is private and writable: reading it shares the page cache with every other process, and a write (an
optimiser step, say) goes to a copy of that page alone and never to the file. Each tensor holds the mapping it stands
on; the mapping ends when the last of them does, whatever became of the loader.

Every storage of the file becomes a torch storage of its own, of exactly its size. One storage for the whole file
would be made half a microsecond faster, but copying or pickling one parameter would then copy the file.

Tensors are made through numpy: an array over the mapping and `torch.from_numpy` take 0.8 us together (1.4 us for the
types that numpy lacks, which need a `view`), `torch.frombuffer` and its `view` 1.7 to 2.5 us.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import torch

from fastload.dtypes import DType, to_torch
from fastload.errors import ChangedFileError, FormatError, TruncatedFileError, UnreadableFileError
from fastload.formats.runs import Runs
from fastload.formats.specs import Region, TensorSpec
from fastload.storage.decoding import decode
from fastload.storage.residency import residency

__all__ = ["MappedFile", "array_type", "is_mappable", "open_unchanged"]

_PAGE = mmap.PAGESIZE


def is_mappable(spec: TensorSpec) -> bool:
    """Whether a tensor's bytes can be used where they lie: stored raw, and aligned to the element."""
    region = spec.region
    return region.encoding is None and region.offset_bytes % spec.dtype.itemsize == 0


@cache
def array_type(dtype: DType) -> tuple[np.dtype[Any], int, torch.dtype | None]:
    """How numpy holds the elements of a type: (numpy's type, bytes of one, what torch must view it as or None)."""
    found = to_torch(dtype)
    try:
        return torch.empty(0, dtype=found, device="cpu").numpy().dtype, dtype.itemsize, None
    except TypeError:  # bfloat16, and floats below it
        return np.dtype(f"i{dtype.itemsize}"), dtype.itemsize, found


class MappedFile:
    """One file, mapped once; makes tensors of its regions.

    Args:
        path: the file.
        n_file_bytes: its size when its header was read. A file that has become shorter since is an error here;
            touching a page beyond its end would kill the process.
        modified_ns: when it was modified last, as it said then; None not to compare that.
        descriptor: the file, if it is open already; it stays open, and must while `is_warm` and `ask_for` are used.

    Raises:
        UnreadableFileError: it cannot be opened or mapped.
        TruncatedFileError: it has become shorter.
        ChangedFileError: it has been modified, or another file has taken its place.
    """

    def __init__(
        self, path: str, n_file_bytes: int, modified_ns: int | None = None, descriptor: int | None = None
    ) -> None:
        self.path = path
        # Borrowed: one of its own would be a third for each of what may be a thousand files.
        self._descriptor = descriptor
        fd = open_unchanged(path, n_file_bytes, modified_ns, descriptor)
        try:
            self._mmap = mmap.mmap(fd, n_file_bytes, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise UnreadableFileError("a weight file cannot be mapped", file=path, found=error.strerror) from error
        finally:
            os.close(fd)
        self._storages: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}

    def check(self) -> None:
        """Raise TruncatedFileError if the file is shorter by now than what is mapped of it. Takes a microsecond.

        It is this file that is asked, also where another has taken its name.
        """
        _check_size(self.path, len(self._mmap), self._mmap.size())

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """The tensor of a spec: a view of the mapping where its bytes allow, a copy otherwise.

        Tensors whose specs share a region share a torch storage, as they did when they were saved.
        """
        storage = self._storage(spec)
        if spec.view is not None:
            return storage.as_strided(spec.shape, spec.view.stride, spec.view.offset)
        return storage.view(spec.shape)

    def tensors(self, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
        """The tensors of specs, each as `tensor` makes it, at a microsecond or two each.

        Specs of one call that share a region share a torch storage; those of different calls share the memory only.
        """
        mapping, ndarray, from_numpy = self._mmap, np.ndarray, torch.from_numpy
        shared = _repeated([spec.region.offset_bytes for spec in specs])
        made = []
        for spec in specs:
            _, dtype, shape, (_, offset, _, encoding), view = spec
            kind, itemsize, viewed_as = array_type(dtype)
            if view is not None or encoding is not None or offset % itemsize or offset in shared:
                made.append(self.tensor(spec))
                continue
            try:
                tensor = from_numpy(ndarray(shape, kind, mapping, offset))
            except ValueError:  # more dimensions than numpy has
                made.append(self.tensor(spec))
                continue
            made.append(tensor if viewed_as is None else tensor.view(viewed_as))
        return made

    def part(self, spec: TensorSpec) -> torch.Tensor:
        """A part of a tensor whose rows lie apart, to be copied at once: as `tensor` makes it."""
        return self.tensor(spec)

    def is_warm(self) -> bool:
        """Whether all of the file is known to be in the page cache (see `residency`)."""
        return self._descriptor is not None and residency(self._descriptor, exact=False).is_warm

    def ask_for(self, runs: Runs) -> None:
        """Have the kernel read runs into the page cache, and nothing around them, without waiting.

        Advice: what is not there when it is used is read then.
        """
        if self._descriptor is None or not hasattr(os, "posix_fadvise"):
            return
        descriptor, n_bytes, advise, advice = self._descriptor, runs.n_bytes, os.posix_fadvise, os.POSIX_FADV_WILLNEED
        with suppress(OSError):
            for offset in runs.offsets():
                advise(descriptor, offset, n_bytes, advice)

    def raw(self, region: Region) -> torch.Tensor:
        """The bytes of a region as they lie in the file, wherever they begin."""
        if region.n_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(self._mmap, dtype=torch.uint8, count=region.n_bytes, offset=region.offset_bytes)

    def release(self, region: Region) -> None:
        """Let go of a region that was read once and will not be used again. Safe to be called by several threads.

        Its whole pages leave this process's resident memory (they stay in the page cache), and a copy that was made
        of it is dropped. Only for regions that nothing has written to: what was written would be lost.
        """
        for at in list(self._storages):
            if at[0] == region.offset_bytes:
                self._storages.pop(at, None)
        n_bytes = region.n_bytes if region.encoding is None else region.encoding.n_bytes
        begin = -(-region.offset_bytes // _PAGE) * _PAGE
        end = (region.offset_bytes + n_bytes) // _PAGE * _PAGE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._mmap.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def stop_reading_around(self) -> None:
        """Have a page that is missing read alone. For those who read what they need themselves, and in time.

        Otherwise the kernel reads megabytes around the page.
        """
        if hasattr(mmap, "MADV_RANDOM"):
            self._mmap.madvise(mmap.MADV_RANDOM)

    def _storage(self, spec: TensorSpec) -> torch.Tensor:
        region, dtype = spec.region, to_torch(spec.dtype)
        if region.n_bytes == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        at = (region.offset_bytes, region.n_bytes, dtype)
        storage = self._storages.get(at)
        if storage is None:
            storage = self._storages[at] = self._make_storage(spec, dtype)
        return storage

    def _make_storage(self, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        region = spec.region
        if is_mappable(spec):
            count = region.n_bytes // spec.dtype.itemsize
            return torch.frombuffer(self._mmap, dtype=dtype, count=count, offset=region.offset_bytes)
        storage = torch.empty(region.n_bytes // spec.dtype.itemsize, dtype=dtype, device="cpu")
        as_bytes = storage.view(torch.uint8)
        if region.encoding is None:
            as_bytes.copy_(self.raw(region))
        else:
            decode(self._mmap, region, as_bytes.numpy().data)
        return storage


def _check_size(path: str, expected: int, found: int) -> None:
    if found < expected:
        raise TruncatedFileError.since_opened(path, expected, found)


def open_unchanged(path: str, n_file_bytes: int, modified_ns: int | None, opened: int | None = None) -> int:
    """A new descriptor of a file that is as it was when its header was read. As for `MappedFile`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if opened is None else os.dup(opened)
        try:
            status = os.fstat(descriptor)
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        raise UnreadableFileError(
            "a weight file cannot be opened",
            file=path,
            found=error.strerror,
            fix="check that it exists and may be read",
        ) from error
    try:
        _check_size(path, n_file_bytes, status.st_size)
        if modified_ns not in (None, status.st_mtime_ns):
            raise ChangedFileError(
                "a weight file was replaced or rewritten after its header was read",
                file=path,
                expected=f"a file last modified at {_time(modified_ns)}",
                found=f"one modified at {_time(status.st_mtime_ns)}",
                fix="open the checkpoint again",
            )
    except FormatError:
        os.close(descriptor)
        raise
    return descriptor


def _time(modified_ns: int | None) -> str:
    seconds, ns = divmod(modified_ns or 0, 10**9)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{ns:09d} UTC"


def _repeated(numbers: list[int]) -> set[int]:
    """Those that occur more than once."""
    if len(set(numbers)) == len(numbers):
        return set()
    return {number for number, count in Counter(numbers).items() if count > 1}
