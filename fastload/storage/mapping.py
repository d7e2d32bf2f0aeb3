"""Files mapped into memory, and tensors that stand on them.

A mapping is private and writable: reading it shares the page cache with every other process, and a write (an
optimiser step, say) goes to a copy of that page alone and never to the file. Each tensor holds the mapping it stands
on; the mapping ends when the last of them does, whatever became of the loader.

Every storage of the file becomes a torch storage of its own, of exactly its size. One storage for the whole file
would be made a microsecond faster, but copying or pickling one parameter would then copy the file.
"""

from __future__ import annotations

import mmap
import os

import torch

from fastload.dtypes import to_torch
from fastload.errors import TruncatedFileError, UnreadableFileError
from fastload.formats.specs import Region, TensorSpec
from fastload.storage.decoding import decode

__all__ = ["MappedFile", "is_mappable"]

_PAGE = mmap.PAGESIZE


def is_mappable(spec: TensorSpec) -> bool:
    """Whether a tensor's bytes can be used where they lie: stored raw, and aligned to the element."""
    region = spec.region
    return region.encoding is None and region.offset_bytes % spec.dtype.itemsize == 0


class MappedFile:
    """One file, mapped once; makes tensors of its regions.

    Args:
        path: the file.
        n_file_bytes: its size when its header was read. A file that has become shorter since is an error here;
            touching a page beyond its end would kill the process.
    """

    def __init__(self, path: str, n_file_bytes: int) -> None:
        self.path = path
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnreadableFileError(
                "a weight file cannot be opened",
                file=path,
                found=error.strerror,
                fix="check that it exists and may be read",
            ) from error
        try:
            size = os.fstat(fd).st_size
            if size < n_file_bytes:
                raise TruncatedFileError(
                    "a weight file was cut after its header was read",
                    file=path,
                    expected=f"{n_file_bytes} bytes",
                    found=f"{size} bytes",
                    fix="wait until whoever writes it is done, then load again",
                )
            self._mmap = mmap.mmap(fd, n_file_bytes, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise UnreadableFileError("a weight file cannot be mapped", file=path, found=error.strerror) from error
        finally:
            os.close(fd)
        self._storages: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """The tensor of a spec: a view of the mapping where its bytes allow, a copy otherwise.

        Tensors whose specs share a region share a torch storage, as they did when they were saved.
        """
        storage = self._storage(spec)
        if spec.view is not None:
            return storage.as_strided(spec.shape, spec.view.stride, spec.view.offset)
        return storage.view(spec.shape)

    def release(self, region: Region) -> None:
        """Let go of a region that was read once and will not be used again.

        Its whole pages leave this process's resident memory (they stay in the page cache), and a copy that was made
        of it is dropped. Only for regions that nothing has written to: what was written would be lost.
        """
        for at in [at for at in self._storages if at[0] == region.offset_bytes]:
            del self._storages[at]
        begin = -(-region.offset_bytes // _PAGE) * _PAGE
        end = (region.offset_bytes + region.n_bytes) // _PAGE * _PAGE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._mmap.madvise(mmap.MADV_DONTNEED, begin, end - begin)

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
            as_bytes.copy_(
                torch.frombuffer(self._mmap, dtype=torch.uint8, count=region.n_bytes, offset=region.offset_bytes)
            )
        else:
            decode(self._mmap, region, as_bytes.numpy().data)
        return storage
