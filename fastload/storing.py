"""What each format stores of a state dict: which names, in which order, and how a shard is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TypeAlias, cast

import torch

from fastload import dtypes
from fastload.errors import SaveError
from fastload.formats.safetensors import encode_header
from fastload.storage.sharing import find_clusters, identity, rehouse
from fastload.storage.writing import FileWriter, TorchSaveTarget, tensor_bytes

__all__ = ["Stored", "Write", "as_bin", "as_safetensors"]

Deferred: TypeAlias = Mapping[str, Callable[[], torch.Tensor]]
Write: TypeAlias = Callable[[FileWriter], None]


@dataclass(frozen=True, slots=True)
class Stored:
    """A state dict as one format stores it.

    Attributes:
        sizes: key -> bytes; 0 for a tensor whose bytes count with another's.
        together: key -> group, of tensors that have to be in one shard.
        n_elements: elements of all tensors; those that share memory count once.
        prepare: checks and lays out a shard of some of the keys; what it returns writes the shard.
    """

    sizes: dict[str, int]
    together: dict[str, Hashable]
    n_elements: int
    prepare: Callable[[Sequence[str]], Write]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors; those that share memory count once."""
        return sum(self.sizes.values())


def as_safetensors(
    tensors: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
    metadata: Mapping[str, str],
    deferred: Deferred,
) -> Stored:
    """Tensors that are the same memory are stored under one name.

    The metadata of the shard notes the other names, as ``safetensors.torch.save_model`` does. Tensors that share
    only a part of their memory are stored in full, each.

    Args:
        tensors: dense tensors, on any device.
        tied: key -> key of which it is a duplicate, and which is the one to be stored.
        metadata: text to store beside ``{"format": "pt"}``.
        deferred: key of a tensor on the meta device -> what loads it.
    """
    metadata = {"format": "pt", **metadata}
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for key, tensor in tensors.items():
        groups[identity(tensor) or key].append(key)
    dropped: dict[str, str] = {}
    for keys in groups.values():
        kept = next((key for key in keys if tied.get(key) not in keys), keys[0])
        # A name that the metadata has another meaning for cannot be noted: its tensor is stored again.
        dropped |= {key: kept for key in keys if key != kept and key not in metadata}
    stored = {key: tensor for key, tensor in tensors.items() if key not in dropped}

    def prepare(keys: Sequence[str]) -> Write:
        entries = [(key, dtypes.from_torch(stored[key].dtype), tuple(stored[key].shape)) for key in keys]
        here = set(keys)
        notes = {key: kept for key, kept in dropped.items() if kept in here}
        header, offsets = encode_header(entries, {**metadata, **notes})

        def write(writer: FileWriter) -> None:
            writer.write(header)
            for key in offsets:
                writer.write(tensor_bytes(_value(key, stored[key], deferred)))

        return write

    return Stored(
        sizes={key: tensor.numel() * tensor.element_size() for key, tensor in stored.items()},
        together={},
        n_elements=sum(tensor.numel() for tensor in stored.values()),
        prepare=prepare,
    )


def as_bin(tensors: Mapping[str, torch.Tensor], deferred: Deferred) -> Stored:
    """Every name, on storages that are no larger than their tensors and shared as those are.

    Args:
        tensors: dense tensors, on any device.
        deferred: key of a tensor on the meta device -> what loads it.
    """
    cluster_of = {key: cluster for cluster in find_clusters(tensors) for key in cluster.keys}
    counted = set()
    sizes, n_elements = {}, 0
    for key, tensor in tensors.items():
        cluster = cluster_of[key]
        sizes[key] = 0 if id(cluster) in counted else cluster.n_bytes
        n_elements += sizes[key] // tensor.element_size()
        counted.add(id(cluster))

    def prepare(keys: Sequence[str]) -> Write:
        def write(writer: FileWriter) -> None:
            shard = dict.fromkeys(keys)
            type_at: dict[int, torch.dtype] = {}
            for cluster in {id(cluster_of[key]): cluster_of[key] for key in keys}.values():
                members = [_value(key, tensors[key], deferred) for key in cluster.keys]
                if cluster.keys[0] in deferred:
                    # What was just loaded is found where it happens to lie.
                    cluster = find_clusters({cluster.keys[0]: members[0]})[0]
                dtype = members[0].dtype
                housed = rehouse(cluster, members)
                # torch.save refuses memory that is seen as two types.
                if type_at.setdefault(housed[0].untyped_storage().data_ptr(), dtype) != dtype:
                    housed = rehouse(cluster, members, copy=True)
                shard.update(zip(cluster.keys, housed, strict=True))
            target = TorchSaveTarget(writer)
            try:
                torch.save(shard, cast("IO[bytes]", target))
            finally:
                target.raise_failure()

        return write

    together = {key: id(cluster) for key, cluster in cluster_of.items() if len(cluster.keys) > 1}
    return Stored(sizes, dict(together), n_elements, prepare)


def _value(key: str, tensor: torch.Tensor, deferred: Deferred) -> torch.Tensor:
    """The tensor that is to be written, loaded if need be. SaveError if it is not the one that was announced."""
    if key not in deferred:
        return tensor
    value = deferred[key]().detach().resolve_conj().resolve_neg()
    if (value.shape, value.dtype) != (tensor.shape, tensor.dtype) or value.is_meta:
        raise SaveError(
            "a tensor that was to be loaded for saving is another one",
            key=key,
            expected=f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            found=f"{value.dtype} of shape {tuple(value.shape)} on {value.device}",
        )
    return value
