"""The files around the weights: the tokenizer, a model card, settings. They go where the weights go."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastload.errors import UnreadableFileError
from fastload.sources.local import CheckpointFiles
from fastload.sources.names import CONFIG_NAME
from fastload.storage.atomic import save_error, write_bytes

__all__ = ["Neighbours", "copy_files", "find_neighbours"]

# The largest tokenizers in use take 40 MB.
_MOST_BYTES = 100 * 10**6
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|ot|gguf|tflite|npz|distcp|index(\..+)?\.json)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The files in a checkpoint's folder that are not its weights, by their paths in it.

    Attributes:
        small: those that belong to a model in whatever format.
        left_out: weights of other formats, and files too large to be anything else.
    """

    small: list[str]
    left_out: list[str]


def find_neighbours(files: CheckpointFiles, out: str, *, whole_folder: bool) -> Neighbours:
    """What is to be copied to ``out`` beside the weights: nothing if that is the same folder, or only a file is meant.

    Hidden files are not among them, and neither are the weights themselves and the config, which are written anew.
    """
    folder = files.folder
    written = {*files.weights, files.index, os.path.join(folder, CONFIG_NAME)}
    small: list[str] = []
    left_out: list[str] = []
    if not whole_folder or _is_same(folder, out):
        return Neighbours(small, left_out)
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not _is_same(os.path.join(parent, name), out)
        )
        for name in sorted(names):
            path = os.path.join(parent, name)
            relative = os.path.relpath(path, folder)
            if name.startswith(".") or path in written or not os.path.isfile(path):
                continue
            if _WEIGHTS.fullmatch(name) or os.path.getsize(path) > _MOST_BYTES:
                left_out.append(relative)
            else:
                small.append(relative)
    return Neighbours(small, left_out)


def copy_files(names: Sequence[str], folder: str, out: str) -> list[str]:
    """Copy files, each whole or not at all; returns their names. Raises UnreadableFileError, SaveError."""
    for name in names:
        source, target = os.path.join(folder, name), os.path.join(out, name)
        data = _read(source)
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
        except OSError as error:
            raise save_error(target, error) from error
        write_bytes(target, data)
    return list(names)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableFileError(
            "a file beside the weights cannot be read", file=path, found=error.strerror, fix="check its permissions"
        ) from error


def _is_same(folder: str, other: str) -> bool:
    return os.path.realpath(folder) == os.path.realpath(other)
