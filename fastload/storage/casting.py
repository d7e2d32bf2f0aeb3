"""Tensors converted to another type, at the speed at which fresh memory can be written.

What a cast costs is not arithmetic but the page faults of its result. Threads convert batches in the order of the
files, each straight from the mapping into its place, and let go of a batch's source pages when it is done: beyond the
result, memory holds the batches that are under way.

Within a batch `torch._foreach_copy_` converts pieces that are small enough for the cache, and for torch to use one
thread for each, in one call without Python's lock. Larger pieces would have torch's own threads at work in every thread
here; these wait for each other by spinning, and on a busy machine a cast then takes ten times as long.

A tensor owns a storage of exactly its size, as a mapped one does: copying or pickling it takes nothing else along.
Small storages stand together in slabs of up to SLAB_BYTES, so that they too come in huge pages and that those which
follow each other in the file are converted as one; the memory of a slab is given back with the last tensor on it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch

from fastload.dtypes import DType, to_torch
from fastload.formats.specs import Region, TensorSpec
from fastload.storage.mapping import MappedFile
from fastload.storage.slabs import HugePages, Slab

__all__ = ["CastRequest", "cast_tensors"]

SLAB_BYTES = 16 << 20
BATCH_ELEMENTS = 2 << 20
# Of at::internal::GRAIN_SIZE in torch/include/ATen/TensorIterator.h: up to here an operation uses one thread.
PIECE_ELEMENTS = 32768
# A storage begins on a multiple of this many elements of the run it is in. Then its address suits vector registers, and
# its last elements are converted as by `Tensor.to`, whose bits for a NaN are others in vectors than in what remains.
_UNIT_ELEMENTS = 64
# Where Python's lock, held for a tenth of the time, begins to limit.
_MAX_THREADS = 8
# Below this huge pages gain less than it takes to see whether they do.
_HUGE_FROM_BYTES = 32 << 20


class CastRequest(NamedTuple):
    """One tensor that is wanted in another type.

    Attributes:
        file: the file it is in.
        spec: where it is.
        dtype: the type it shall have.
    """

    file: MappedFile
    spec: TensorSpec
    dtype: DType


class _Run(NamedTuple):
    """Elements that lie one after another in a file, and will in a slab. Offsets are bytes."""

    file: MappedFile
    source_dtype: DType
    source_offset: int
    dtype: DType
    slab: Slab
    offset: int
    n_elements: int

    @property
    def region(self) -> Region:
        """The elements in the file."""
        return Region(self.file.path, self.source_offset, self.n_elements * self.source_dtype.itemsize)

    @property
    def n_result_bytes(self) -> int:
        """Size of the elements in the slab."""
        return self.n_elements * self.dtype.itemsize

    @property
    def result(self) -> torch.Tensor:
        """The elements in the slab, as a flat tensor."""
        return self.slab.tensor(self.dtype, self.offset, self.n_elements)

    def part(self, begin: int, n_elements: int) -> _Run:
        """Some of the elements."""
        return self._replace(
            source_offset=self.source_offset + begin * self.source_dtype.itemsize,
            offset=self.offset + begin * self.dtype.itemsize,
            n_elements=n_elements,
        )


def cast_tensors(requests: Sequence[CastRequest], advance: Callable[[int], None]) -> list[torch.Tensor]:
    """The tensors of requests on the CPU, each equal to ``file.tensor(spec).to(dtype)``.

    Requests for one region and one type share a storage, as in the file, unless that would take more memory.

    Args:
        requests: what is wanted.
        advance: called in this thread with a number of the files' bytes whenever so many more are done.

    Raises:
        what `MappedFile.tensor` does; OSError where there is no memory.
    """
    groups: dict[tuple[Region, DType, DType], list[TensorSpec]] = {}
    for _, spec, dtype in requests:
        groups.setdefault((spec.region, spec.dtype, dtype), []).append(spec)
    files = {spec.region.file: file for file, spec, _ in requests}
    plain: list[CastRequest] = []
    storages: dict[tuple[Region, DType, DType], torch.Tensor] = {}
    for (region, source_dtype, dtype), specs in groups.items():
        if not _is_cheaper_whole(specs):
            continue
        n_elements = region.n_bytes // source_dtype.itemsize
        # A scalar is converted as one: for a NaN, `Tensor.to` gives other bits than in a tensor with dimensions.
        shape = (n_elements,) if n_elements > 1 or specs[0].shape else ()
        request = CastRequest(files[region.file], TensorSpec("", source_dtype, shape, region), dtype)
        if region.encoding is None and shape:
            plain.append(request)
        else:
            storages[region, source_dtype, dtype] = _cast_alone(request, advance)
    plain.sort(key=lambda request: request.spec.region[:2])
    for request, storage in zip(plain, _cast_plain(plain, advance), strict=True):
        storages[request.spec.region, request.spec.dtype, request.dtype] = storage
    return [_as_asked(request, storages, advance) for request in requests]


def _is_cheaper_whole(specs: Sequence[TensorSpec]) -> bool:
    """Whether a storage that specs stand on needs no more memory than each of the tensors on its own."""
    first = specs[0]
    if first.view is None or first.region.n_bytes == 0:
        return first.region.n_bytes > 0
    return sum(prod(spec.shape) for spec in specs) >= first.region.n_bytes // first.dtype.itemsize


def _as_asked(
    request: CastRequest,
    storages: Mapping[tuple[Region, DType, DType], torch.Tensor],
    advance: Callable[[int], None],
) -> torch.Tensor:
    _, spec, dtype = request
    storage = storages.get((spec.region, spec.dtype, dtype))
    if storage is None:
        return _cast_alone(request, advance)
    if spec.view is None:
        return storage.view(spec.shape)
    return storage.as_strided(spec.shape, spec.view.stride, spec.view.offset)


def _cast_alone(request: CastRequest, advance: Callable[[int], None]) -> torch.Tensor:
    """A tensor that is decoded, a small part of its storage, a scalar or empty."""
    file, spec, dtype = request
    tensor = file.tensor(spec).to(to_torch(dtype), copy=True)
    file.release(spec.region)
    advance(spec.region.n_bytes)
    return tensor


def _cast_plain(requests: Sequence[CastRequest], advance: Callable[[int], None]) -> list[torch.Tensor]:
    """Whole storages, in the order of the files, as flat tensors."""
    storages = _lay_out(requests)
    pages = HugePages() if sum(storage.n_result_bytes for storage in storages) >= _HUGE_FROM_BYTES else None
    n_threads = _n_threads(sum(storage.n_elements for storage in storages))
    _in_threads(n_threads, _batches(_joined(storages)), partial(_convert, pages), advance)
    return [storage.result for storage in storages]


def _lay_out(requests: Sequence[CastRequest]) -> list[_Run]:
    """Give every storage its place in a slab."""
    places: list[tuple[int, int]] = []
    sizes: list[int] = []
    for _, spec, dtype in requests:
        unit = _UNIT_ELEMENTS * dtype.itemsize
        n_bytes = spec.shape[0] * dtype.itemsize
        offset = -(-sizes[-1] // unit) * unit if sizes else 0
        if not sizes or offset + n_bytes > max(SLAB_BYTES, sizes[-1]):
            sizes.append(0)
            offset = 0
        sizes[-1] = offset + n_bytes
        places.append((len(sizes) - 1, offset))
    slabs = [Slab(size) for size in sizes]
    return [
        _Run(file, spec.dtype, spec.region.offset_bytes, dtype, slabs[number], offset, spec.shape[0])
        for (file, spec, dtype), (number, offset) in zip(requests, places, strict=True)
    ]


def _joined(runs: Iterable[_Run]) -> Iterator[_Run]:
    """Runs that go on in both file and slab, as one."""
    last: _Run | None = None
    for run in runs:
        if last is not None and last.part(last.n_elements, run.n_elements) == run:
            last = last._replace(n_elements=last.n_elements + run.n_elements)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def _batches(runs: Iterable[_Run]) -> Iterator[list[_Run]]:
    """Runs in portions of one to two times BATCH_ELEMENTS, the long ones in parts."""
    batch: list[_Run] = []
    n_elements = 0
    for run in runs:
        for begin in range(0, run.n_elements, BATCH_ELEMENTS):
            part = run.part(begin, min(BATCH_ELEMENTS, run.n_elements - begin))
            batch.append(part)
            n_elements += part.n_elements
            if n_elements >= BATCH_ELEMENTS:
                yield batch
                batch, n_elements = [], 0
    if batch:
        yield batch


def _in_threads(
    n_threads: int,
    batches: Iterator[list[_Run]],
    convert: Callable[[list[_Run]], int],
    advance: Callable[[int], None],
) -> None:
    """Convert all batches in this thread and n_threads - 1 others, which have ended when this returns or raises.

    The first error of any thread, an interrupt too, stops all of them at the end of their batch, and is raised.
    """
    taking, stop = threading.Lock(), threading.Event()
    done: deque[int] = deque()
    errors: list[BaseException] = []

    def work(tell: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    with taking:
                        batch = next(batches, None)
                    if batch is None:
                        break
                    done.append(convert(batch))
                    tell()
        except BaseException as error:  # noqa: BLE001  raised again below
            errors.append(error)
            stop.set()

    def tell() -> None:
        while done:
            advance(done.popleft())

    threads = [threading.Thread(target=work, args=(lambda: None,), name="fastload-cast") for _ in range(n_threads - 1)]
    for thread in threads:
        thread.start()
    work(tell)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    tell()


def _convert(pages: HugePages | None, batch: Sequence[_Run]) -> int:
    """Convert a batch and let go of its source. Returns the number of the files' bytes."""
    sources: list[torch.Tensor] = []
    destinations: list[torch.Tensor] = []
    for run in batch:
        if pages is not None:
            pages.prepare(run.slab, run.offset, run.n_elements * run.dtype.itemsize)
        source = run.file.tensor(TensorSpec("", run.source_dtype, (run.n_elements,), run.region))
        sources += torch.split(source, PIECE_ELEMENTS)
        destinations += torch.split(run.result, PIECE_ELEMENTS)
    torch._foreach_copy_(destinations, sources)
    for run in batch:
        run.file.release(run.region)
    return sum(run.region.n_bytes for run in batch)


def _n_threads(n_elements: int) -> int:
    """As many as this process may use, by its processors and by what torch was told, and no more than have work."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(n_cpus, torch.get_num_threads(), _MAX_THREADS, -(-n_elements // BATCH_ELEMENTS))
