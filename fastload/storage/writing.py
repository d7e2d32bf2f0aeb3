"""Writing tensors' bytes to a file straight from the memory they stand in."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

import torch

__all__ = ["FileWriter", "RegionWriter", "TorchSaveTarget", "tensor_bytes"]

Writer = TypeVar("Writer", bound="_Gatherer")

# Below this, a copy costs less than a system call.
_SMALL_BYTES = 64 << 10
# How much is gathered into one call, and how much of a large tensor is written before progress is told.
_BATCH_BYTES = 8 << 20
_CHUNK_BYTES = 64 << 20
# A call takes 1,024 buffers at most (IOV_MAX).
_BATCH_BUFFERS = 1000


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor in row-major order, as bytes.

    No copy is made of a contiguous tensor in CPU memory; any other is copied, and the copy lives as long as
    the memoryview.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


class _Gatherer:
    """An open file, and pieces that wait to be written to it in one call.

    Args:
        descriptor: the file, open for writing; closed with the writer.
        progress: called with the number of bytes whenever some were written.
    """

    def __init__(self, descriptor: int, progress: Callable[[int], None] | None = None) -> None:
        self._descriptor = descriptor
        self._progress = progress
        self._pending: list[memoryview] = []

    def flush(self) -> None:
        """Hand everything to the operating system. Raises OSError."""
        buffers, self._pending = self._pending, []
        while buffers:
            # Fewer bytes than asked for is no error: the call that writes none tells why.
            n_written = self._write_some(_beginning(buffers, _CHUNK_BYTES))
            if self._progress is not None:
                self._progress(n_written)
            _drop_beginning(buffers, n_written)

    def _write_some(self, buffers: Sequence[memoryview]) -> int:
        raise NotImplementedError

    def sync(self) -> None:
        """Have the file on the disk. Raises OSError."""
        self.flush()
        os.fsync(self._descriptor)

    def __enter__(self: Writer) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


class FileWriter(_Gatherer):
    """A file from its beginning to its end: small pieces are gathered, and large ones go to it without a copy.

    The file ends complete only if ``flush`` was called; leaving it as a context manager closes it.
    """

    def __init__(self, descriptor: int, progress: Callable[[int], None] | None = None) -> None:
        super().__init__(descriptor, progress)
        self._n_pending = 0

    def write(self, data: bytes | memoryview) -> int:
        """Take all of ``data``, whose memory need not outlive the call. Raises OSError."""
        view = memoryview(data).cast("B")
        is_small = view.nbytes < _SMALL_BYTES
        if view.nbytes:
            self._pending.append(memoryview(bytes(view)) if is_small else view)
            self._n_pending += view.nbytes
        if not is_small or self._n_pending >= _BATCH_BYTES or len(self._pending) >= _BATCH_BUFFERS:
            self.flush()
        return view.nbytes

    def flush(self) -> None:
        """Hand everything to the operating system. Raises OSError."""
        self._n_pending = 0
        super().flush()

    def write_again(self, beginning: bytes) -> None:
        """Replace the first bytes of the file by as many others. Raises OSError."""
        self.flush()
        done = 0
        while done < len(beginning):
            done += os.pwrite(self._descriptor, memoryview(beginning)[done:], done)

    def _write_some(self, buffers: Sequence[memoryview]) -> int:
        return os.writev(self._descriptor, buffers)


class RegionWriter(_Gatherer):
    """Regions of a file that other processes write to as well; those that follow each other go in one call.

    The file has all bytes only once ``flush`` was called; leaving it as a context manager closes it.
    """

    def __init__(self, descriptor: int, progress: Callable[[int], None] | None = None) -> None:
        super().__init__(descriptor, progress)
        self._begin = self._end = 0

    def write_at(self, offset_bytes: int, data: memoryview) -> None:
        """Take bytes for a place of the file; their memory stays as it is until ``flush``. Raises OSError."""
        if offset_bytes != self._end or len(self._pending) >= _BATCH_BUFFERS:
            self.flush()
            self._begin = self._end = offset_bytes
        self._pending.append(data)
        self._end += data.nbytes
        if self._end - self._begin >= _BATCH_BYTES:
            self.flush()

    def _write_some(self, buffers: Sequence[memoryview]) -> int:
        n_written = os.pwritev(self._descriptor, buffers, self._begin)
        self._begin += n_written
        return n_written


def _drop_beginning(buffers: list[memoryview], n_bytes: int) -> None:
    """Take the first bytes away from buffers."""
    while n_bytes:
        first = buffers[0]
        if n_bytes < first.nbytes:
            buffers[0] = first[n_bytes:]
            break
        n_bytes -= first.nbytes
        del buffers[0]


def _beginning(buffers: Sequence[memoryview], n_bytes: int) -> list[memoryview]:
    """As many of the buffers as fit into ``n_bytes``; of the first, a part if it alone does not."""
    if buffers[0].nbytes >= n_bytes:
        return [buffers[0][:n_bytes]]
    chunk: list[memoryview] = []
    for buffer in buffers:
        n_bytes -= buffer.nbytes
        if n_bytes < 0:
            break
        chunk.append(buffer)
    return chunk


class TorchSaveTarget:
    """What ``torch.save`` writes to in place of a file, so that the reason of a failure is not lost.

    torch replaces an exception that its file raises with one about the zip archive it could then not finish.
    Here the first one is kept, what follows is thrown away, and ``raise_failure`` raises it.
    """

    def __init__(self, writer: FileWriter) -> None:
        self._writer = writer
        self._failure: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write, unless that failed before."""
        if self._failure is None:
            try:
                self._writer.write(data)
            except BaseException as failure:  # noqa: BLE001  raised again by raise_failure
                self._failure = failure
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing: the writer is flushed by whoever made it."""

    def raise_failure(self) -> None:
        """Raise what ``write`` met, if anything."""
        if self._failure is not None:
            raise self._failure
