"""Which tensors stand on the same memory, and giving them a storage that holds nothing else.

A tensor of a state dict may be a view: of a buffer ten thousand times its size, of another tensor, of itself
transposed. ``torch.save`` writes whole storages; what is saved should be the tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Cluster", "byte_span", "find_clusters", "identity", "rehouse"]

# A storage that starts at a multiple of this suits every element type.
_ALIGNMENT_BYTES = 16


def identity(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are the same elements of the same memory; None for one that has no memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@dataclass(frozen=True, slots=True)
class Cluster:
    """Tensors of one type whose bytes overlap, directly or through others of them.

    Attributes:
        keys: their names.
        begin_bytes: where the first of their bytes is in their storage.
        end_bytes: where the last of them ends.
    """

    keys: tuple[str, ...]
    begin_bytes: int
    end_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes from the first to the last."""
        return self.end_bytes - self.begin_bytes


def find_clusters(tensors: Mapping[str, torch.Tensor]) -> list[Cluster]:
    """Divide strided tensors into those that share bytes. Each is in one cluster, most alone in theirs."""
    spans: dict[Hashable, list[tuple[int, int, str]]] = defaultdict(list)
    for key, tensor in tensors.items():
        memory = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.dtype)
        has_memory = tensor.numel() and not tensor.is_meta
        spans[memory if has_memory else key].append((*byte_span(tensor), key))
    clusters = []
    for ranges in spans.values():
        begin, end = 0, 0
        keys: list[str] = []
        for next_begin, next_end, key in sorted(ranges, key=lambda span: span[:2]):
            if keys and next_begin >= end:
                clusters.append(Cluster(tuple(keys), begin, end))
                keys = []
            if not keys:
                begin = next_begin
            end = max(end, next_end)
            keys.append(key)
        clusters.append(Cluster(tuple(keys), begin, end))
    return clusters


def rehouse(cluster: Cluster, tensors: Sequence[torch.Tensor], *, copy: bool = False) -> list[torch.Tensor]:
    """The tensors of a cluster on a CPU storage of no more than their bytes, which they still share.

    In CPU memory nothing is copied: the new storage is a window on the old one.

    Args:
        cluster: from ``find_clusters``.
        tensors: those of ``cluster.keys``.
        copy: copy in any case.
    """
    if cluster.n_bytes == 0:
        return [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in tensors]
    storage = tensors[0].untyped_storage()
    begin = cluster.begin_bytes // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
    whole = (begin, cluster.end_bytes) == (0, storage.nbytes())
    if whole and not copy and storage.device.type == "cpu":
        return [tensor.detach() for tensor in tensors]
    window = torch.empty(0, dtype=torch.uint8, device=storage.device)
    window = window.set_(storage, begin, (cluster.end_bytes - begin,), (1,))
    if copy or storage.device.type != "cpu":
        window = window.to("cpu", copy=True)
    else:
        window = torch.frombuffer(window.numpy().data, dtype=torch.uint8)
    return [_moved(tensor, window.untyped_storage(), begin) for tensor in tensors]


def _moved(tensor: torch.Tensor, storage: torch.UntypedStorage, begin_bytes: int) -> torch.Tensor:
    offset = tensor.storage_offset() - begin_bytes // tensor.element_size()
    empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return empty.set_(storage, offset, tensor.shape, tensor.stride())


def byte_span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the bytes of a tensor begin and end in its storage."""
    if tensor.numel() == 0:
        return 0, 0
    begin = int(tensor.storage_offset())
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    end = begin + sum((size - 1) * stride for size, stride in strides) + 1
    return begin * tensor.element_size(), end * tensor.element_size()
