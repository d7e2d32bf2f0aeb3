"""What each format stores of a state dict: which names, in which order, and how a shard is written.

A safetensors shard has checksums of its tensors in its header (see ``fastload.formats.checksums``). Tensors that are in
memory as they will be in the file are hashed before the first byte is written, so that the file is written from its
beginning to its end, as some mounts of object stores demand. What has to be loaded or copied for writing is hashed
then, and the header, whose length is known, is written once more at the end.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, islice
from typing import IO, Protocol, TypeAlias, cast

import torch

from fastload import dtypes
from fastload.errors import SaveError
from fastload.formats.checksums import BLOCK_BYTES, CHECKSUMS, blank_checksums, n_blocks, seal, unseal
from fastload.formats.safetensors_layout import encode_header
from fastload.storage.devices import Device, Devices, device_for
from fastload.storage.hashing import block_checksums
from fastload.storage.sharing import Cluster, find_clusters, identity, rehouse
from fastload.storage.unloading import unload
from fastload.storage.writing import FileWriter, TorchSaveTarget, tensor_bytes

__all__ = ["SafetensorsShard", "Shard", "Stored", "as_bin", "as_safetensors"]

Deferred: TypeAlias = Mapping[str, Callable[[], torch.Tensor]]


class Shard(Protocol):
    """One file of a checkpoint, laid out and checked, not yet written."""

    def write(self, writer: FileWriter) -> str:
        """Write the file. Returns the checksum that stands for all of it; "" where the format has none."""

    def find(self, path: str) -> str | None:
        """The checksum of the file at ``path`` if it is this shard already; None if it is not, or cannot be told."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A state dict as one format stores it.

    Attributes:
        sizes: key -> bytes; 0 for a tensor whose bytes count with another's.
        together: key -> group, of tensors that have to be in one shard.
        n_elements: elements of all tensors; those that share memory count once.
        prepare: checks and lays out a shard of some of the keys.
    """

    sizes: dict[str, int]
    together: dict[str, Hashable]
    n_elements: int
    prepare: Callable[[Sequence[str]], Shard]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors; those that share memory count once."""
        return sum(self.sizes.values())


def as_safetensors(
    tensors: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
    metadata: Mapping[str, str],
    deferred: Deferred,
    devices: Devices = device_for,
    memories: Mapping[str, Hashable] | None = None,
) -> Stored:
    """Tensors that are the same memory are stored under one name.

    The metadata of the shard notes the other names, as ``safetensors.torch.save_model`` does. Tensors that share
    only a part of their memory are stored in full, each.

    Args:
        tensors: dense tensors, on any device.
        tied: key -> key of which it is a duplicate, and which is the one to be stored.
        metadata: text to store beside ``{"format": "pt"}``.
        deferred: key of a tensor on the meta device -> what loads it.
        devices: the device of a name, for tensors that are copied out by `unload`.
        memories: key -> what is equal for tensors that are the same memory, where that is not seen from the tensors.
    """
    # The place of the checksums is taken, so that no tied name is noted there.
    metadata = {"format": "pt", **metadata, CHECKSUMS: ""}
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for key, tensor in tensors.items():
        groups[(identity(tensor) if memories is None else memories[key]) or key].append(key)
    dropped: dict[str, str] = {}
    for keys in groups.values():
        kept = next((key for key in keys if tied.get(key) not in keys), keys[0])
        # A name that the metadata has another meaning for cannot be noted: its tensor is stored again.
        dropped |= {key: kept for key in keys if key != kept and key not in metadata}
    stored = {key: tensor for key, tensor in tensors.items() if key not in dropped}

    def prepare(keys: Sequence[str]) -> Shard:
        here = set(keys)
        notes = {key: kept for key, kept in dropped.items() if kept in here}
        return SafetensorsShard.of({key: stored[key] for key in keys}, {**metadata, **notes}, deferred, devices)

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

    def prepare(keys: Sequence[str]) -> Shard:
        return _BinShard(tensors, keys, [*{id(cluster_of[key]): cluster_of[key] for key in keys}.values()], deferred)

    together = {key: id(cluster) for key, cluster in cluster_of.items() if len(cluster.keys) > 1}
    return Stored(sizes, dict(together), n_elements, prepare)


@dataclass(frozen=True, slots=True)
class SafetensorsShard:
    """A safetensors file.

    Attributes:
        header: its first bytes, with zeros for the checksums.
        tensors: in the order of the file.
        deferred: as for ``as_safetensors``.
        on_device: key of a tensor on a device -> the device, in the order of the file.
    """

    header: bytes
    tensors: dict[str, torch.Tensor]
    deferred: Deferred
    on_device: dict[str, Device]

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], deferred: Deferred, devices: Devices
    ) -> SafetensorsShard:
        entries = [(key, dtypes.from_torch(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()]
        blank = blank_checksums(_n_bytes(tensor) for tensor in tensors.values())
        header, offsets = encode_header(entries, {**metadata, CHECKSUMS: blank})
        device_of = cache(lambda device: devices(str(device)))
        found = {key: None if key in deferred else device_of(tensors[key].device) for key in offsets}
        on_device = {key: device for key, device in found.items() if device is not None}
        return cls(header, {key: tensors[key] for key in offsets}, deferred, on_device)

    @property
    def offsets(self) -> dict[str, int]:
        """Where in the file each tensor begins, ascending."""
        ends = accumulate(map(_n_bytes, self.tensors.values()), initial=len(self.header))
        return dict(zip(self.tensors, ends, strict=False))

    def write(self, writer: FileWriter) -> str:
        late = [key for key, tensor in self.tensors.items() if not self._is_at_hand(key, tensor)]
        blocks = self._blocks_at_hand()
        header, whole = (self.header, "") if late else seal(self.header, _joined(self.tensors, blocks))
        writer.write(header)
        with ExitStack() as unloading:
            pieces = self._unload(unloading)
            for key, tensor in self.tensors.items():
                found = []
                for data in self._data(key, tensor, pieces):
                    if key not in blocks:
                        found += block_checksums([data])
                    writer.write(data)
                    del data  # before the next one is loaded
                blocks.setdefault(key, found)
        if late:
            header, whole = seal(self.header, _joined(self.tensors, blocks))
            writer.write_again(header)
        return whole

    def find(self, path: str) -> str | None:
        try:
            with open(path, "rb", buffering=0) as file:
                found = file.read(len(self.header))
                n_bytes = len(self.header) + sum(map(_n_bytes, self.tensors.values()))
                if os.fstat(file.fileno()).st_size != n_bytes:
                    return None
        except OSError:
            return None
        if unseal(found) != self.header:  # no need to look at values
            return None
        blocks = self._blocks_at_hand()
        for key, tensor in self.tensors.items():
            if key not in blocks:
                blocks[key] = block_checksums([tensor_bytes(_value(key, tensor, self.deferred))])
        header, whole = seal(self.header, _joined(self.tensors, blocks))
        return whole if header == found else None

    def _unload(self, closing: ExitStack) -> dict[str, Iterator[memoryview]]:
        """Key of a tensor on a device -> the pieces of all tensors there, of which its own come next in its turn."""
        pieces: dict[str, Iterator[memoryview]] = {}
        keys_of: dict[str, list[str]] = {}
        for key, device in self.on_device.items():
            keys_of.setdefault(device.name, []).append(key)
        for keys in keys_of.values():
            coming = unload([self.tensors[key] for key in keys], self.on_device[keys[0]], BLOCK_BYTES)
            closing.callback(coming.close)
            pieces |= dict.fromkeys(keys, coming)
        return pieces

    def _data(self, key: str, tensor: torch.Tensor, pieces: Mapping[str, Iterator[memoryview]]) -> Iterable[memoryview]:
        """A tensor's bytes: in one piece, or in blocks as they come from a device."""
        if key in pieces:
            return islice(pieces[key], n_blocks(_n_bytes(tensor)))
        return [tensor_bytes(_value(key, tensor, self.deferred))]

    def _is_at_hand(self, key: str, tensor: torch.Tensor) -> bool:
        """Whether the tensor's bytes are in memory as they will be in the file."""
        is_elsewhere = key in self.on_device or key in self.deferred or tensor.device.type != "cpu"
        return not is_elsewhere and tensor.is_contiguous()

    def _blocks_at_hand(self) -> dict[str, list[str]]:
        at_hand = {key: tensor for key, tensor in self.tensors.items() if self._is_at_hand(key, tensor)}
        checksums = iter(block_checksums([tensor_bytes(tensor) for tensor in at_hand.values()]))
        return {key: [*islice(checksums, n_blocks(_n_bytes(tensor)))] for key, tensor in at_hand.items()}


def _joined(keys: Iterable[str], blocks: Mapping[str, Sequence[str]]) -> list[str]:
    return [block for key in keys for block in blocks[key]]


def _n_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, slots=True)
class _BinShard:
    """A .bin file. The zip that torch writes has checksums of its own.

    Attributes:
        tensors: those of all shards.
        keys: the names in this one.
        clusters: what holds them.
        deferred: as for ``as_bin``.
    """

    tensors: Mapping[str, torch.Tensor]
    keys: Sequence[str]
    clusters: Sequence[Cluster]
    deferred: Deferred

    def write(self, writer: FileWriter) -> str:
        shard: dict[str, torch.Tensor | None] = dict.fromkeys(self.keys)
        type_at: dict[int, torch.dtype] = {}
        for cluster in self.clusters:
            members = [_value(key, self.tensors[key], self.deferred) for key in cluster.keys]
            if cluster.keys[0] in self.deferred:
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
        return ""

    def find(self, path: str) -> str | None:
        return None


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
