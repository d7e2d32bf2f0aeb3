"""Checkpoints for torch.distributed.checkpoint (DCP), written by its own writer from one process.

Reading them needs nothing of torch.distributed, and is `fastload.formats.dcp`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from fastload.errors import OptionError, SaveError
from fastload.formats.detection import DCP_METADATA, DCP_SUFFIX
from fastload.storage.atomic import save_error

__all__ = ["prepare_folder", "write_folder"]


def prepare_folder(folder: str) -> None:
    """Make a folder that DCP can write to. OptionError if there is one with something in it; SaveError if it cannot be.

    DCP overwrites file by file, so that no moment exists at which an old checkpoint becomes a new one.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise save_error(folder, error) from error
    if names:
        raise OptionError(
            "a folder for torch.distributed.checkpoint must be new",
            file=folder,
            expected="no folder of this name, or an empty one",
            found=", ".join(names[:4]),
            fix="give another folder, or empty this one",
        )


def write_folder(
    tensors: Mapping[str, torch.Tensor], folder: str, progress: Callable[[int], None] = lambda _: None
) -> tuple[str, ...]:
    """Write tensors as a DCP folder, which ``dcp.load`` reads on any number of ranks.

    One tensor after the other goes from its memory to the file. ``.metadata`` is written last: a folder without it is
    no checkpoint.

    Args:
        tensors: what to write, by key.
        folder: where to; made by `prepare_folder`.
        progress: called with the number of bytes of each tensor.

    Returns:
        the names of the files written.

    Raises:
        SaveError: writing failed; what was written is deleted.
    """
    try:
        with warnings.catch_warnings():
            # That there is no process group is told as if it were a mistake.
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable|uninitialized)")
            save(dict(tensors), storage_writer=FileSystemWriter(folder), planner=_Planner(progress))
    except BaseException as error:
        _remove_files(folder)
        if isinstance(error, (CheckpointException, OSError)):
            raise _save_error(folder, error) from error
        raise
    return tuple(_files(folder))


class _Planner(DefaultSavePlanner):
    """DCP's planner, which tells of each tensor that is written."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        super().__init__()
        self._progress = progress

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        if isinstance(data, torch.Tensor):
            self._progress(data.nbytes)
        return data


def _files(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(DCP_SUFFIX) or name.startswith(DCP_METADATA))


def _remove_files(folder: str) -> None:
    with suppress(OSError):
        for name in _files(folder):
            os.unlink(os.path.join(folder, name))


def _save_error(folder: str, error: CheckpointException | OSError) -> SaveError:
    causes = [error] if isinstance(error, OSError) else [cause for cause, _ in error.failures.values()]
    for cause in causes:
        # What the system said is often not raised last: closing the archive fails too.
        reason: BaseException | None = cause
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__cause__ or reason.__context__
        if reason is not None:
            return save_error(folder, reason)
    return SaveError(
        "torch.distributed.checkpoint could not write the checkpoint",
        file=folder,
        found="; ".join(f"{type(cause).__name__}: {cause}" for cause in causes)[:500],
        fix="see the reason above; what had been written is deleted",
    )
