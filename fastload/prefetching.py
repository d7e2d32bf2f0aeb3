"""Reading checkpoints ahead: started before torch is imported, joined by the loads that follow.

A file that is cold (its bytes are not in the page cache) is read in the background in the order in which the model
will use it, while Python imports torch, the skeleton is built and the first layers compute. One file is read ahead by
one reader at a time, however many ask. A file that is warm costs a tenth of a millisecond, and no thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from fastload.errors import FastloadError
from fastload.formats.runs import GAP_BYTES
from fastload.reports import format_bytes
from fastload.storage.readahead import Extent, Readahead, Way, choose_way, within_memory
from fastload.storage.residency import file_system, residency

if TYPE_CHECKING:
    from fastload.formats.specs import TensorSpec
    from fastload.options import FileOptions, HubOptions

__all__ = ["Prefetch", "prefetch", "read_ahead", "read_ahead_early", "stop_reading"]

# Less than this is read by the load itself before a thread has begun.
_LEAST_BYTES = 4 << 20
# Tensors with no more than this between them are read as one run.
_GAP_BYTES = 1 << 20


class Prefetch:
    """A checkpoint that is being read ahead.

    Keeping this object is not needed: reading goes on without it.

    Attributes:
        error: why nothing is read, if the checkpoint was not found; the load will raise the same. None otherwise.
    """

    def __init__(self) -> None:
        self.error: FastloadError | None = None
        self._runs: tuple[_Run, ...] = ()
        self._begun = threading.Event()
        self._stopped = False
        self._pid = os.getpid()

    @property
    def is_done(self) -> bool:
        """All is in the page cache, as far as it is going to be."""
        return self._is_foreign or (self._begun.is_set() and all(run.is_done for run in self._runs))

    @property
    def note(self) -> str:
        """What is being done, in a sentence; "" if nothing is."""
        return "; ".join(run.note for run in self._runs)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all is read; False if it is not within the timeout. Never raises because of the files."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        if self._is_foreign:
            return True
        if not self._begun.wait(timeout_s):
            return False
        return all(run.wait(None if end is None else max(0.0, end - time.monotonic())) for run in self._runs)

    def stop(self) -> None:
        """Stop reading these files ahead, whoever else asked for it. Returns at once."""
        self._stopped = True
        for run in self._runs:
            run.stop()

    @property
    def _is_foreign(self) -> bool:
        """Made by the process that this one was forked from; its threads are not here."""
        return os.getpid() != self._pid

    def _begin(self, runs: Sequence[_Run]) -> None:
        self._runs = tuple(runs)
        self._begun.set()
        if self._stopped:
            self.stop()


def prefetch(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    subfolder: str = "",
    use_safetensors: bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Prefetch:
    """Begin to read a checkpoint into the page cache, and return at once.

    Called before ``import torch``, the import hides the reading. Loads of the same files in this process join what is
    being read. No more is read than free memory holds.

    Args:
        path: a folder, one weight file, an index, or a hub id whose files are in the download cache already.
        variant, subfolder, use_safetensors, revision, cache_dir: as for `open_checkpoint`.

    Raises:
        OptionError: an option that cannot be. A checkpoint that is not found is no error here (see `Prefetch.error`).
    """
    from fastload.options import FileOptions, HubOptions

    files = FileOptions(variant=variant, subfolder=subfolder, use_safetensors=use_safetensors)
    hub = HubOptions(revision=revision, cache_dir=cache_dir, local_files_only=True)
    result = Prefetch()

    def begin() -> None:
        runs: Sequence[_Run] = ()
        try:
            runs = _start(_locate(path, files, hub))
        except FastloadError as error:
            result.error = error
        finally:
            result._begin(runs)

    threading.Thread(target=begin, name="fastload-prefetch", daemon=True).start()
    return result


def read_ahead(
    files: Iterable[str],
    specs: Iterable[TensorSpec] | None = None,
    *,
    descriptors: Mapping[str, int] | None = None,
    nothing_between: bool = False,
) -> Prefetch | None:
    """Read weight files ahead that are cold, and join those that are being read. None where all are warm.

    Args:
        files: paths.
        specs: their tensors, if they are known; otherwise the headers are read in the background. None of them leaves
            the order of the files.
        descriptors: path -> the file, of those that are open already, for as long as this call lasts.
        nothing_between: leave out what lies between these tensors, and behind them, however little it is.
    """
    runs = _start(files, specs, descriptors, nothing_between)
    if not runs:
        return None
    result = Prefetch()
    result._begin(runs)
    return result


def read_ahead_early(path: str | os.PathLike[str], files: FileOptions, hub: HubOptions) -> None:
    """What a load does before it imports torch: look for the files, and read ahead what is cold.

    Nothing is fetched and nothing raised; the load itself does both.
    """
    from dataclasses import replace

    with suppress(FastloadError):
        read_ahead(_locate(path, files, replace(hub, local_files_only=True, force_download=False)))


def stop_reading(files: Iterable[str]) -> None:
    """Stop whoever reads these files ahead, because the caller is about to read them itself."""
    with _lock:
        runs = [found for path in files if isinstance(found := _look_at(path), _Run)]
    for run in runs:
        run.stop()


def _locate(path: str | os.PathLike[str], files: FileOptions, hub: HubOptions) -> tuple[str, ...]:
    from fastload.sources.resolve import locate_checkpoint

    return locate_checkpoint(path, files, hub).weights


class _File(NamedTuple):
    """A file to be read ahead: its path, its identity, about how many bytes of it are cold, and how to read it."""

    path: str
    identity: tuple[int, int]
    n_cold_bytes: int
    way: Way


_lock = threading.Lock()
# What is being read at this moment, by device and inode: a blob of the download cache has many names.
_running: dict[tuple[int, int], _Run] = {}


def _forget() -> None:
    """In a forked child: the threads that would end these are not here, and the lock may have been held."""
    global _lock
    _lock = threading.Lock()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _start(
    files: Iterable[str],
    specs: Iterable[TensorSpec] | None = None,
    descriptors: Mapping[str, int] | None = None,
    nothing_between: bool = False,
) -> list[_Run]:
    """The runs that read these files: those under way, and a new one for what is cold besides."""
    joined: dict[int, _Run] = {}
    cold: list[_File] = []
    with _lock:
        for path in files:
            found = _look_at(path, (descriptors or {}).get(path))
            if isinstance(found, _Run):
                joined[id(found)] = found
            elif found is not None:
                cold.append(found)
        if sum(file.n_cold_bytes for file in cold) < _LEAST_BYTES:
            return list(joined.values())
        run = _Run(cold, specs, nothing_between)
        _running.update((file.identity, run) for file in cold)
    return [*joined.values(), run] if run.start() else list(joined.values())


def _look_at(path: str, held: int | None = None) -> _File | _Run | None:
    """The run that is reading a file, or what is to be read of it; None where it is warm or cannot be read.

    Held is the file, if it is open already.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) if held is None else held
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        if identity in _running:
            return _running[identity]
        state = residency(descriptor, exact=False)  # to count takes as long as many a load; who reads does it
        return None if state.is_warm else _File(path, identity, state.n_cold_bytes, choose_way(file_system(descriptor)))
    except OSError:
        return None
    finally:
        if held is None:
            os.close(descriptor)


class _Run:
    """One reading of some files, from their headers to the last byte, on a thread that waits for the others."""

    def __init__(self, files: Sequence[_File], specs: Iterable[TensorSpec] | None, nothing_between: bool) -> None:
        self._files = files
        self._nothing_between = nothing_between
        self._specs = specs
        self._readahead: Readahead | None = None
        self._stopped = False
        self._done = threading.Event()
        n_cold = sum(file.n_cold_bytes for file in files)
        if nothing_between:
            n_cold = min(n_cold, sum(spec.region.n_bytes for spec in specs or ()))
        # For a few pages that are missing no more threads than do the load good, which they compete with.
        way = files[0].way
        self._way = way._replace(n_threads=min(way.n_threads, -(-n_cold // way.chunk_bytes)))
        n_kept = sum(part.n_bytes for part in within_memory([Extent("", 0, n_cold)]))
        part = "" if n_kept == n_cold else f" (of {format_bytes(n_cold)}: as much as free memory holds)"
        self.note = f"cold: reading ahead about {format_bytes(n_kept)}{part} with {self._way}"

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def start(self) -> bool:
        """False where no thread can be had; then nothing is read ahead."""
        try:
            threading.Thread(target=self._run, name="fastload-readahead", daemon=True).start()
        except RuntimeError:
            self._end()
            return False
        return True

    def wait(self, timeout_s: float | None) -> bool:
        return self._done.wait(timeout_s)

    def stop(self) -> None:
        self._stopped = True
        if self._readahead is not None:
            self._readahead.stop()

    def _run(self) -> None:
        try:
            paths = [file.path for file in self._files]
            specs = _read_specs(paths) if self._specs is None else self._specs
            self._specs = None
            if self._is_stopped():
                return
            whole = [Extent(path, 0, os.stat(path).st_size) for path in paths]
            extents = _extents(specs, paths, GAP_BYTES if self._nothing_between else _GAP_BYTES)
            readahead = Readahead(within_memory(extents or whole), self._way, nothing_behind=self._nothing_between)
            self._readahead = readahead
            # Someone may have stopped this run when there was no readahead to stop yet.
            if self._is_stopped():
                readahead.stop()
            readahead.wait()
        except (FastloadError, OSError):
            pass  # a damaged header or a lost file, which the load will say more about
        finally:
            self._end()

    def _is_stopped(self) -> bool:
        return self._stopped

    def _end(self) -> None:
        with _lock:
            for file in self._files:
                _running.pop(file.identity, None)
        self._done.set()


def _read_specs(paths: Iterable[str]) -> list[TensorSpec]:
    from fastload.formats.detection import DCP_SUFFIX, read_file

    # Chunks that ranks have written say nothing of the order of use: all of their files is read.
    return [spec for path in paths if not path.endswith(DCP_SUFFIX) for spec in read_file(path).specs]


def _extents(specs: Iterable[TensorSpec], paths: Iterable[str], gap_bytes: int) -> list[Extent]:
    """What to read of these files, in the order of use; tensors that lie side by side, but for a gap, as one."""
    from fastload.formats.order import in_order_of_use

    wanted, runs = set(paths), list[Extent]()
    for spec in in_order_of_use(spec for spec in specs if spec.region.file in wanted):
        file, begin, n_bytes, encoding = spec.region
        n_bytes = n_bytes if encoding is None else encoding.n_bytes
        if runs and runs[-1].file == file:
            known = runs[-1]
            known_end = known.offset_bytes + known.n_bytes
            if known.offset_bytes <= begin <= known_end + gap_bytes:
                runs[-1] = known._replace(n_bytes=max(known_end, begin + n_bytes) - known.offset_bytes)
                continue
        runs.append(Extent(file, begin, n_bytes))
    return [run for run in runs if run.n_bytes]
