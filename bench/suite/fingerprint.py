"""Are two results the same? Weights by hash, outputs within a tolerance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["ResultsDifferError", "fingerprint", "fingerprint_of", "same_digest", "same_output"]

OUTPUT_TOLERANCE = 1e-5


class ResultsDifferError(AssertionError):
    """Two loaders that ought to give the same result did not: their times mean nothing."""


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors on the CPU, whatever their order.

    It reads every byte on the calling thread, through no torch kernel: torch's thread pool stays as it was.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_of(result: Any) -> str:
    """The fingerprint of what a loader returned: a module, or a dict of tensors."""
    return fingerprint(result if isinstance(result, dict) else result.state_dict())


def same_digest(digests: Mapping[str, str]) -> None:
    """Raise ResultsDifferError unless all loaders' digests are one."""
    if len(set(digests.values())) > 1:
        listed = ", ".join(f"{loader} {digest[:12]}" for loader, digest in digests.items())
        raise ResultsDifferError(f"the loaders returned different bytes: {listed}")


def same_output(outputs: Mapping[str, Sequence[float]]) -> None:
    """Raise ResultsDifferError unless all loaders' outputs agree within OUTPUT_TOLERANCE."""
    (first, reference), *others = outputs.items()
    for loader, values in others:
        gap = max(abs(a - b) for a, b in zip(reference, values, strict=True))
        if not gap <= OUTPUT_TOLERANCE:
            raise ResultsDifferError(f"the outputs of {first} and {loader} differ by {gap}")
