"""Which bytes a load brought, told by the device that has them: 16 GB need not come back to be compared."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["fingerprint"]

_BLOCK_ITEMS = 1 << 22


def fingerprint(result: Any) -> str:
    """A digest of names, types, shapes and all bytes of a module's state, or of a dict of tensors.

    Of every block of 4 Mi words the sum of words times random odd weights is taken, modulo 2**64 (multilinear hashing:
    Lemire and Kaser, 2014): any one changed word changes it, and so does any exchange of words, but for a chance of
    about 2**-60. The sums, in order, go into a SHA-256.
    """
    import torch

    tensors: dict[str, torch.Tensor] = result if isinstance(result, dict) else result.state_dict()
    names = sorted(tensors)
    sums = [block for name in names for block in _sums(tensors[name].detach())]
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
    if sums:
        digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(tensor: torch.Tensor) -> list[torch.Tensor]:
    import torch

    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[min(8, tensor.element_size())]
    words = tensor.contiguous().reshape(-1).view(word)
    weights = _weights(words.device)
    return [(block.long() * weights[: len(block)]).sum() for block in torch.split(words, _BLOCK_ITEMS) if len(block)]


@cache
def _weights(device: torch.device) -> torch.Tensor:
    """Random odd numbers of 64 bits, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    limits = torch.iinfo(torch.int64)
    return (torch.randint(limits.min, limits.max, (_BLOCK_ITEMS,), generator=generator) | 1).to(device)
