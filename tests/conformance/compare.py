"""What a loaded model is, as plain data, and how two of them differ."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

SCALARS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
AT_MOST_SHOWN = 4
META = "meta"
COMPUTED = ("attribute", "non-persistent buffer")


@dataclass(frozen=True, slots=True)
class TensorState:
    """One tensor that a model holds under a name; `content` is every byte, so that NaN counts as itself."""

    kind: str
    type_name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str
    requires_grad: bool
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ModelState:
    """Everything about a model that a user of `from_pretrained` could notice."""

    model_type: str
    modules: Mapping[str, str]
    tensors: Mapping[str, TensorState]
    same_objects: frozenset[frozenset[str]]
    same_storages: frozenset[frozenset[str]]
    scalars: Mapping[str, str]
    training: Mapping[str, bool]
    hooks: Mapping[str, int]
    config: Mapping[str, str]
    generation_config: Mapping[str, str]
    device_map: str
    weight_conversions: tuple[str, ...]


def model_state(model: PreTrainedModel) -> ModelState:
    """The state of a model, copied: the model may change or die afterwards."""
    tensors = dict(_tensors(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    generation_config = getattr(model, "generation_config", None)
    return ModelState(
        model_type=_type_name(model),
        modules={name: _type_name(module) for name, module in modules.items()},
        tensors={name: tensor_state(kind, tensor) for name, (kind, tensor) in tensors.items()},
        same_objects=_groups({name: id(tensor) for name, (_, tensor) in tensors.items()}),
        same_storages=_groups(
            {name: tensor.data_ptr() for name, (_, tensor) in tensors.items() if not tensor.is_meta and tensor.numel()}
        ),
        scalars={
            f"{name}:{key}": repr(value)
            for name, module in modules.items()
            for key, value in vars(module).items()
            if isinstance(value, SCALARS)
        },
        training={name: module.training for name, module in modules.items()},
        hooks={name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in modules.items()},
        config=_flat(model.config.to_dict()),
        generation_config=_flat(generation_config.to_dict()) if generation_config is not None else {},
        device_map=repr(getattr(model, "hf_device_map", "none")),
        weight_conversions=tuple(_conversion(c) for c in getattr(model, "_weight_conversions", None) or ()),
    )


def differences(expected: Any, found: Any) -> list[str]:
    """One line for each thing that differs between two states (or two other dataclasses of plain data)."""
    lines: list[str] = []
    for member in fields(expected):
        one, other = getattr(expected, member.name), getattr(found, member.name)
        if isinstance(one, Mapping):
            lines += [f"{member.name}: {line}" for line in _mapping_differences(one, other)]
        elif isinstance(one, frozenset):
            lines += [f"{member.name}: lost {_shown(group)}" for group in sorted(one - other, key=_shown)]
            lines += [f"{member.name}: gained {_shown(group)}" for group in sorted(other - one, key=_shown)]
        elif one != other:
            lines.append(f"{member.name}: expected {one!r}, found {other!r}")
    return lines


def mended(built: ModelState, expected: ModelState, found: ModelState) -> list[str]:
    """Computed tensors that the expected model left on meta or holds garbage in, and that are right in the other."""
    return [
        name
        for name, one in expected.tensors.items()
        if one.kind in COMPUTED
        and (original := built.tensors.get(name)) is not None
        and (other := found.tensors.get(name)) is not None
        and other.device != META
        and (one.device == META or one.content != original.content == other.content)
    ]


def _mapping_differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Which names are missing, extra, or hold something else."""
    yield from (f"missing {name}" for name in expected if name not in found)
    yield from (f"extra {name}" for name in found if name not in expected)
    for name in expected:
        if name not in found or expected[name] == found[name]:
            continue
        if isinstance(expected[name], TensorState):
            yield from (f"{name}: {line}" for line in _tensor_differences(expected[name], found[name]))
        else:
            yield f"{name}: expected {expected[name]}, found {found[name]}"


def _tensor_differences(expected: TensorState, found: TensorState) -> Iterator[str]:
    for member in fields(expected):
        one, other = getattr(expected, member.name), getattr(found, member.name)
        if one == other:
            continue
        if member.name != "content":
            yield f"{member.name}: expected {one}, found {other}"
        elif len(one) == len(other):
            unequal = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
            yield f"{len(unequal)} of {len(one)} bytes differ, the first at {unequal[0]}"


def _tensors(model: nn.Module) -> Iterator[tuple[str, tuple[str, torch.Tensor]]]:
    """Parameters, buffers and plain tensor attributes of every module, under every name that leads to them."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = prefix + "." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, ("parameter", parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kept = COMPUTED[1] if name in module._non_persistent_buffers_set else "buffer"
                yield dot + name, (kept, buffer)
        for name, value in vars(module).items():
            if name not in {"_parameters", "_buffers", "_modules"}:
                yield from ((dot + path, (COMPUTED[0], tensor)) for path, tensor in _attributes(name, value))


def _attributes(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that an attribute is, or holds in a list, tuple or dict."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _attributes(f"{name}[{i}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _attributes(f"{name}[{key!r}]", item)


def tensor_state(kind: str, tensor: torch.Tensor) -> TensorState:
    plain = tensor.detach()
    content = b"" if plain.is_meta else bytes(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return TensorState(
        kind=kind,
        type_name=_type_name(tensor),
        dtype=str(tensor.dtype),
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        device=str(tensor.device),
        requires_grad=tensor.requires_grad,
        content=content,
    )


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _groups(marks: Mapping[str, Hashable]) -> frozenset[frozenset[str]]:
    """The names that share a mark, where more than one does."""
    sharing = defaultdict(set)
    for name, mark in marks.items():
        sharing[mark].add(name)
    return frozenset(frozenset(names) for names in sharing.values() if len(names) > 1)


def _shown(names: frozenset[str]) -> str:
    first = sorted(names)[:AT_MOST_SHOWN]
    return " = ".join(first) + (f" = {len(names) - len(first)} more" if len(names) > len(first) else "")


def _flat(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True, default=repr) for key, value in settings.items()}


def _conversion(conversion: object) -> str:
    """A renaming or converter without the addresses of what it holds."""
    return without_addresses(repr(conversion))


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text)
