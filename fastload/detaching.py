"""Giving a model memory of its own, for those who will rewrite in place the files that it stands on."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterator

import torch
from torch import nn

from fastload.storage.sharing import byte_span, find_clusters, rehouse

__all__ = ["detach"]


def detach(model: nn.Module) -> int:
    """Copy every tensor of a model that stands on a mapped file into memory of the process's own.

    Afterwards the files may be rewritten, cut or deleted in place. Parameters stay the objects they are (optimisers,
    hooks and ties that hold them stay right), and tensors that shared memory share it still. The copy is made tensor
    by tensor, by all of torch's threads; what it needs is the size of the result.

    A mapping ends with the last tensor on it. Tensors that others hold (a view of a parameter, another model that
    shares it) are not the model's, and keep theirs.

    Args:
        model: any module, loaded by fastload or by something else that maps files (``torch.load(mmap=True)``,
            safetensors). Parameters, buffers, and tensors that are attributes of its modules are looked at.

    Returns:
        Bytes that were copied; 0 if nothing stood on a file. Where the platform does not tell what is mapped (only
        Linux does), every tensor in CPU memory is copied.
    """
    standing = {str(index): tensor for index, tensor in enumerate(_standing_on_files(model))}
    views: dict[int, torch.Tensor] = {}
    n_copied = 0
    with torch.no_grad():
        for cluster in find_clusters(standing):
            tensors = [standing[key] for key in cluster.keys]
            if len(tensors) == 1 and tensors[0].nbytes < cluster.n_bytes:
                # Rows that lie apart in the file, as a rank's part may have: what is between them is not the model's.
                copies = [tensors[0].clone(memory_format=torch.contiguous_format)]
            else:
                copies = rehouse(cluster, tensors, copy=True)
            for tensor, moved in zip(tensors, copies, strict=True):
                tensor.data = moved
                if tensor._is_view():
                    views[id(tensor)] = tensor.data
            n_copied += min(cluster.n_bytes, sum(copied.nbytes for copied in copies))
    _replace(model, views)
    return n_copied


def _replace(model: nn.Module, views: dict[int, torch.Tensor]) -> None:
    """Put other objects in the place of buffers that are views: a view keeps what it is a view of, and its memory.

    A parameter is never one.
    """
    if not views:
        return
    for module in model.modules():
        for held in (module._buffers, module.__dict__):
            for name, value in held.items():
                if id(value) in views:
                    held[name] = views[id(value)]


def _standing_on_files(model: nn.Module) -> Iterator[torch.Tensor]:
    mapped = _file_mappings()
    begins = [begin for begin, _ in mapped] if mapped is not None else []
    for tensor in _tensors_of(model):
        storage = _storage(tensor)
        if storage is None:
            continue
        begin, end = byte_span(tensor)
        address = storage.data_ptr()
        # A tensor without elements may hold a mapping just as well, and has no address to tell.
        if mapped is None or begin == end or _overlaps(address + begin, address + end, mapped, begins):
            yield tensor


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Each tensor object that the modules hold, once; of a distributed tensor the part that is here."""
    seen: set[int] = set()
    for module in model.modules():
        for held in (module._parameters, module._buffers, module.__dict__):
            for value in held.values():
                if isinstance(value, torch.Tensor):
                    tensor = getattr(value, "_local_tensor", value)
                    if id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield tensor


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The CPU memory that a tensor stands on; None where it has none."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
        return storage if storage.data_ptr() or not tensor.numel() else None
    except (NotImplementedError, RuntimeError):  # a subclass that only pretends to have memory
        return None


def _overlaps(begin: int, end: int, mapped: list[tuple[int, int]], begins: list[int]) -> bool:
    """Whether [begin, end) touches one of the sorted ranges."""
    index = bisect.bisect_left(begins, end) - 1
    return index >= 0 and mapped[index][1] > begin


def _file_mappings() -> list[tuple[int, int]] | None:
    """Ranges of addresses that are private mappings of files, in ascending order; None where that is not told.

    The kernel's own list (proc(5), maps) knows every mapping whoever made it, also the pieces of fused tensors. Shared
    mappings are left out: they are memory that processes share on purpose (``share_memory_``).
    """
    if not sys.platform.startswith("linux"):
        return None
    ranges: list[tuple[int, int]] = []
    try:
        with open("/proc/self/maps", "rb") as maps:
            for line in maps:
                # address range, permissions, offset, device, inode, path
                addresses, permissions, _, _, inode, *_ = line.split(None, 5)
                if permissions.endswith(b"p") and inode != b"0":
                    begin, _, end = addresses.partition(b"-")
                    ranges.append((int(begin, 16), int(end, 16)))
    except OSError:
        return None
    return ranges
