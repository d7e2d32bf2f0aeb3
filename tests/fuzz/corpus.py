"""Inputs that fuzzing found to be different from each other, kept to start from: one archive a target."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["read_corpus", "write_corpus"]

_FOLDER = Path(__file__).with_name("corpus")
_MAX_INPUTS = 300
_EPOCH = (2026, 1, 1, 0, 0, 0)


def read_corpus(target: str) -> list[bytes]:
    """The inputs kept for a target, small ones first; none where there is no archive."""
    path = _FOLDER / f"{target}.zip"
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return sorted((archive.read(name) for name in archive.namelist()), key=lambda data: (len(data), data))


def write_corpus(target: str, inputs: Iterable[bytes]) -> None:
    """Keep inputs, the smallest if there are too many."""
    _FOLDER.mkdir(exist_ok=True)
    chosen = sorted(set(inputs), key=lambda data: (len(data), data))[:_MAX_INPUTS]
    with zipfile.ZipFile(_FOLDER / f"{target}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for data in chosen:
            archive.writestr(zipfile.ZipInfo(hashlib.sha256(data).hexdigest()[:16], _EPOCH), data, zipfile.ZIP_DEFLATED)
