"""Whether there is anything of torch.distributed to care for; asked by all, and free where it was never imported."""

from __future__ import annotations

import sys
from collections.abc import Iterable

__all__ = ["are_laid_out", "is_first_rank"]


def are_laid_out(tensors: Iterable[object]) -> bool:
    """Whether some tensors are DTensors, laid out over ranks."""
    if "torch.distributed.tensor" not in sys.modules:
        return False  # nobody can have made one
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def is_first_rank() -> bool:
    """Whether this is the rank that does what is done once, of those that save together."""
    import torch.distributed as dist

    return dist.get_rank() == 0
