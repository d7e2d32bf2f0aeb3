"""What the checkpoint of a transformers model holds: which tensors, under which keys, in which shards.

As transformers has it: without the keys that a class does not save, tied tensors once, and under the names and in the
layout of the files that the model came from. No weights are copied for that. Experts are cut out of their fused
parameter as views, and what is offloaded to disk stays there until it is written.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion

from fastload.distributed.detection import are_laid_out
from fastload.plan.sharding import split_into_shards
from fastload.saving import load_of_offloaded
from fastload.storage.sharing import byte_span

__all__ = ["Contents", "OverRanks", "collect", "collect_over_ranks"]

Tensors: TypeAlias = dict[str, torch.Tensor]
Load: TypeAlias = Callable[[], torch.Tensor]
InFiles: TypeAlias = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        tensors: key -> tensor; on the meta device if it is offloaded.
        offloaded: key of such a tensor -> what loads it.
        shards: the keys of each shard; None where they are simply divided by size.
    """

    tensors: Tensors
    offloaded: dict[str, Load]
    shards: list[list[str]] | None


@dataclass(frozen=True, slots=True)
class OverRanks:
    """What a checkpoint holds that all ranks save together.

    Attributes:
        tensors: the model's own, DTensors among them.
        in_files: makes of them what the files hold; None for what they are.
        shards: as of `Contents`.
    """

    tensors: Tensors
    in_files: InFiles | None
    shards: list[list[str]] | None


def collect_over_ranks(model: Any, *, original_format: bool, max_shard_bytes: int) -> OverRanks:
    """As `collect`, for a model that is laid out over ranks: the same on all of them."""
    kept = _kept(model, model.state_dict())
    shards = None
    if sum(map(_n_bytes, kept.values())) > max_shard_bytes:
        shards = _shards_of_transformers(model, kept, original_format, max_shard_bytes)
    return OverRanks(kept, partial(_revert, model) if original_format else None, shards)


def collect(
    model: Any, state_dict: Mapping[str, torch.Tensor], *, original_format: bool, max_shard_bytes: int
) -> Contents:
    """What the checkpoint of a model holds.

    Args:
        model: a PreTrainedModel.
        state_dict: its state dict, or what the caller has in the place of one; it stays as it is.
        original_format: undo the conversions of names and layout that the load made.
        max_shard_bytes: most bytes of a shard.
    """
    if not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        return Contents(dict(state_dict), {}, None)  # the saver refuses what is none, by name
    kept = _kept(model, state_dict)
    tensors, loads = dict(kept), {}
    for name, tensor in kept.items():
        if tensor.is_meta and (load := load_of_offloaded(model, name)) is not None:
            # A tensor object of its own, by which it is known again under another key.
            tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            loads[id(tensors[name])] = load
    if original_format:
        tensors = _revert_offloaded(model, tensors, loads)
    shards = None
    if sum(map(_n_bytes, tensors.values())) > max_shard_bytes:
        shards = _shards_of_transformers(model, kept, original_format, max_shard_bytes)
        if shards is not None and sorted(key for keys in shards for key in keys) != sorted(tensors):
            shards = None
    offloaded = {key: loads[id(tensor)] for key, tensor in tensors.items() if id(tensor) in loads}
    return Contents(tensors, offloaded, shards)


def _kept(model: Any, state_dict: Mapping[str, torch.Tensor]) -> Tensors:
    """Without the keys that the class does not save, and with tied tensors once, under the name that a load expects.

    Tensors that the class does not declare to be tied are kept under every name, each in full: no reader would tie
    them again. (Where this is so, transformers refuses to save.)
    """
    ignored = model._keys_to_ignore_on_save or ()
    tensors = {name: tensor for name, tensor in state_dict.items() if name not in ignored}
    of_memory: dict[Hashable, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        of_memory[_memory(model, name, tensor)].append(name)
    shared = [sorted(names) for names in of_memory.values() if len(names) > 1]
    patterns = _tied_patterns(model) if shared else []
    for names in shared:
        declared = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
        for name in declared if len(declared) < len(names) else declared[:-1]:
            del tensors[name]
        for name in [name for name in names if name in tensors][1:]:
            tensors[name] = tensors[name].clone()
    return tensors


def _memory(model: Any, name: str, tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are the same memory; of offloaded and laid out ones, for those that are one parameter."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return name
    if tensor.is_meta or are_laid_out((tensor,)):
        try:
            return id(model.get_parameter_or_buffer(name))
        except AttributeError:  # a state dict of other names
            return name
    begin, end = byte_span(tensor)
    address = tensor.untyped_storage().data_ptr()
    return tensor.device, address + begin, address + end


def _tied_patterns(model: Any) -> list[str]:
    """Patterns of the names that the classes of a model declare to be tied to others."""
    return [
        f"{name}.{pattern}" if name else pattern
        for name, module in model.named_modules()
        for pattern in getattr(module, "_tied_weights_keys", None) or ()
    ]


def _revert_offloaded(model: Any, tensors: Tensors, loads: Mapping[int, Load]) -> Tensors:
    """Undo what the load converted. Offloaded tensors that only get another name stay what they are."""
    try:
        reverted = _revert(model, tensors)
    except RuntimeError:
        if not loads:
            raise
        reverted = {}  # an operation that takes no mixture of devices
    renamed_only = {id(tensor) for tensor in reverted.values()}
    touched = {
        name: loads[id(tensor)]()
        for name, tensor in tensors.items()
        if id(tensor) in loads and id(tensor) not in renamed_only
    }
    return _revert(model, tensors | touched) if touched else reverted


def _revert(model: Any, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """transformers' own undoing of what the load converted."""
    try:
        with _Views():
            reverted = revert_weight_conversion(model, tensors)
    except RuntimeError:  # an operation that needs a contiguous tensor
        reverted = revert_weight_conversion(model, tensors)
    return dict(reverted)


class _Views(TorchFunctionMode):
    """Leaves out copies that only make a tensor contiguous: that is done when it is written, one at a time."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.contiguous and len(args) == 1 and not kwargs:
            return args[0]
        return func(*args, **(kwargs or {}))


def _shards_of_transformers(
    model: Any, kept: Tensors, original_format: bool, max_shard_bytes: int
) -> list[list[str]] | None:
    """The keys of each shard as transformers divides them; None where that cannot be known.

    transformers counts storages, and puts tensors of one storage into one shard: all the experts of a layer, say. It
    is told what it would see by tensors without memory. A model with a device map that names the CPU or the disk it
    divides before it undoes the conversions.
    """
    likenesses = {
        name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        for name, tensor in kept.items()
    }
    if not original_format:
        return _split(likenesses, max_shard_bytes)
    try:
        if {"cpu", "disk"}.isdisjoint(getattr(model, "hf_device_map", {}).values()):
            return _split(revert_weight_conversion(model, likenesses), max_shard_bytes)
        shards = _split(likenesses, max_shard_bytes)
        return [list(revert_weight_conversion(model, {key: likenesses[key] for key in keys})) for keys in shards]
    except (RuntimeError, ValueError):  # an operation that needs values, or tensors of several shards
        return None


def _split(tensors: Mapping[str, torch.Tensor], max_shard_bytes: int) -> list[list[str]]:
    storages = {key: tensor.untyped_storage() for key, tensor in tensors.items()}
    sizes = {key: storage.nbytes() for key, storage in storages.items()}
    # Those without elements have no address, which counts as one storage.
    groups = {key: storage._cdata if sizes[key] else 0 for key, storage in storages.items()}
    return split_into_shards(sizes, max_shard_bytes, groups)


def _n_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
