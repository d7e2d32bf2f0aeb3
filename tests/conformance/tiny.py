"""Models so small that one of each class is built, written and loaded in a fraction of a second.

A config class says its fields, their defaults and its parts, and a field's name says what it sizes. So one table of
names shrinks every family; `exceptions.py` holds what no name can tell.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tests.conformance.exceptions import BY_CONFIG, BY_MODEL

SIZES = {
    "vocabulary": 128,
    "positions": 64,
    "width": 32,
    "inner": 48,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "experts": 4,
    "top_k": 2,
    "expert_groups": 1,
    "layers": 2,
    "dense_layers": 1,
}
MOST_LAYERS = 8
MOST_PARAMETERS = 3_000_000

# What a field sizes; the first pattern that its name matches decides. "keep" sizes nothing that costs.
KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("token", r"token_(id|ids|index)$|_token$|^(im|audio|image)_\w*_id$|^(mask|unk|pad|bos|eos)_(index|id)$"),
        (
            "layer_index",
            r"index(es)?$(?<!ignore_index)|(?<!out_)indices$|_layer$|feature_layers?$|extract_layers|_hook_ids$",
        ),
        ("keep", r"conv_layers$|^out_indices$|^return_idx$"),
        ("keep", r"kernel|stride|ratio|rate|factor|coef|loss|cost|temperature|pad|seed|pattern|offset|multipl|mult$"),
        ("keep", r"expan|divisor|_every_|interval|step$|period|dilation|image_size|patch|chunk|batch|block_size|roi"),
        ("keep", r"crop|grid|resolution|pool|cache|buffer|num_channels|in_chans|num_mel_bins|sampling"),
        ("vocabulary", r"vocab|num_embed|hash_buckets|codebook_size|num_codevectors|num_(\w+_)?labels|ngram"),
        ("dense_layers", r"first_k_dense|num_dense_layers|kv_shared_layers|num_mem_blocks|n_layers_per"),
        ("layers", r"layers?$|^depths?$|num_blocks$|_depth$|num_hidden_groups|block_repeats|^block_sizes$"),
        ("top_k", r"topk?$|top_k$|experts_per_tok|moe_k$"),
        ("experts", r"experts$|expert_num$"),
        ("expert_groups", r"^n_groups?$|topk_group"),
        ("kv_heads", r"key_value_heads|kv_heads"),
        ("heads", r"heads?$|num_heads"),
        ("head_dim", r"head_?(dim|size)$|d_kv|d_head|dim_head|nope_head|kv_channels"),
        (
            "positions",
            r"position(s|_embeddings)?$|prediction_length|max_seq|seq_len|context_length|n_ctx|num_queries|window",
        ),
        ("inner", r"intermediate|ffn|inner|mlp_dim|d_ff|dff|feed_?forward|linear_units"),
        ("width", r"sizes?$|dims?$|channels?$|width|embd|d_model|hidden|features|units|rank|emb$|dim_|planes|latents"),
        ("width", r"num_filters|upsample_groups"),
    )
)


class NotBuiltError(Exception):
    """A class cannot be built, with the reason."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """One way to shrink; rungs are tried until a model can be built that is small.

    Attributes:
        divides: widths are divided, which keeps how they relate; else all are the same small one.
        fills: sizes that have no default are given one.
    """

    divides: bool = False
    fills: bool = False


LADDER = (Rung(), Rung(fills=True), Rung(divides=True))


def build(model_class: type[PreTrainedModel], seed: int) -> PreTrainedModel:
    """A tiny model with random values in every parameter and stored buffer.

    Raises:
        NotBuiltError: on no rung, with the reason of the first; or not without packages that are not here.
    """
    reasons = []
    fixed = BY_MODEL.get(model_class.__name__)
    for rung in LADDER:
        try:
            with torch.device("meta"):
                config = tiny_config(model_class.config_class, rung, fixed)
                n_parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
            if n_parameters > MOST_PARAMETERS:
                reasons.append(f"too big: {n_parameters:,} parameters")
                continue
            torch.manual_seed(seed)
            model = model_class(tiny_config(model_class.config_class, rung, fixed))
        except ImportError as error:
            packages = re.findall(r"requires the (.+?) library|named '(\w+)'", str(error))
            raise NotBuiltError(f"needs {', '.join(''.join(names) for names in packages) or error}") from error
        except Exception as error:  # noqa: BLE001
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            _randomise(model, seed)
            return model
    raise NotBuiltError(reasons[0])


def tiny_config(
    config_class: type[PreTrainedConfig],
    rung: Rung,
    fixed: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """A small config of the class.

    Args:
        config_class: the class.
        rung: how to shrink.
        fixed: values that are taken as they are; those of a part in a dict.
        given: values that are shrunk instead of the defaults.
    """
    values: dict[str, Any] = {}
    fixed = {**_stages(config_class, given or {}), **BY_CONFIG.get(config_class.__name__, {}), **(fixed or {})}
    for name, (part_class, part_given) in _parts(config_class).items():
        fixed_part = {key: value for key, value in fixed.pop(name, {}).items() if key != "model_type"}
        values[name] = tiny_config(part_class, rung, fixed_part, part_given)
    values |= fixed
    for name, value in (_defaults(config_class) | dict(given or {})).items():
        if name not in values:
            small = _small(name, value, config_class, rung)
            if small != value or name in (given or {}):
                values[name] = small
    config = config_class(**values)
    filled = _filled(config, values, rung)
    return config_class(**values, **filled) if filled else config


@cache
def _parts(config_class: type[PreTrainedConfig]) -> dict[str, tuple[type[PreTrainedConfig], Mapping[str, Any]]]:
    """The parts that a config must have: their classes, and what the whole gives them."""
    parts = {
        name: (part, {})
        for name, part in config_class.sub_configs.items()
        if isinstance(part, type) and issubclass(part, PreTrainedConfig) and part is not config_class
    }
    for name, spec in config_class.sub_configs_defaults.items():
        parts.pop(name, None)
        if not spec.optional:
            # A table may name another type for a part: transformers itself does not know one that it names.
            model_type = BY_CONFIG.get(config_class.__name__, {}).get(name, {}).get("model_type")
            named = issubclass(spec.config_class, PreTrainedConfig) and not model_type
            part = spec.config_class if named else spec.get_config_class(model_type or spec.model_type)
            parts[name] = (part, spec.init_kwargs)
    return parts


def _stages(config_class: type[PreTrainedConfig], given: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone of layers that is asked for the outputs of some: as many layers as outputs."""
    n_outputs = len(given.get("out_indices") or given.get("out_features") or ())
    if not n_outputs or "num_hidden_layers" not in _defaults(config_class):
        return {}
    return {
        "num_hidden_layers": n_outputs,
        "out_indices": list(range(1, n_outputs + 1)),
        "out_features": [f"stage{i}" for i in range(1, n_outputs + 1)],
    }


@cache
def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """What the fields of a default config hold, parts and common fields left out."""
    try:
        default = vars(config_class())
    except Exception:  # noqa: BLE001
        default = {}
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"vocab_size"}
    values = {}
    for field in dataclasses.fields(config_class):
        if (
            field.init
            and field.name[0] != "_"
            and field.name not in common
            and field.name not in config_class.sub_configs
        ):
            declared = field.default if field.default is not dataclasses.MISSING else None
            if declared is None and field.default_factory is not dataclasses.MISSING:
                declared = field.default_factory()
            values[field.name] = default.get(field.name) if declared is None else declared
    return values


@cache
def _field_types(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(config_class)}


@cache
def _n_layers(config_class: type[PreTrainedConfig]) -> tuple[int, int]:
    """How many layers there are by default, and how many show each kind of layer that there is."""
    defaults = _defaults(config_class)
    n_default = defaults.get(_own_name(config_class, "num_hidden_layers"), 0)
    if not isinstance(n_default, int) or n_default <= SIZES["layers"]:
        return n_default or 0, SIZES["layers"]
    enough = SIZES["layers"]
    for kinds in _layer_kinds(config_class, defaults):
        if len(kinds) == n_default and all(isinstance(kind, str) for kind in kinds):
            enough = max([enough, *(kinds.index(kind) + 1 for kind in set(kinds))])
    return n_default, min(enough, MOST_LAYERS)


def _layer_kinds(config_class: type[PreTrainedConfig], defaults: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """Lists that may have an entry for each layer: fields, and what some classes compute."""
    yield from (value for value in defaults.values() if isinstance(value, (list, tuple)))
    with suppress(Exception):
        config = config_class()
        for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
            yield getattr(config, name, None) or ()


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "keep")


def _own_name(config_class: type[PreTrainedConfig], name: str) -> str:
    """What a config class calls a field that has a common name."""
    return config_class.attribute_map.get(name, name)


def _small(name: str, value: Any, config_class: type[PreTrainedConfig], rung: Rung) -> Any:
    """The small value of a field, or the value itself."""
    kind = _kind(name)
    n_default, n_layers = _n_layers(config_class)
    if isinstance(value, (list, tuple)):
        if len(value) == n_default > n_layers:
            value = value[:n_layers]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return value
        # Some classes take lists only, which is what they get from JSON, though their defaults are tuples.
        made = list if "list" in str(_field_types(config_class).get(name, list)) else type(value)
        return made(_small_entry(kind, v, rung) for v in value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name == _own_name(config_class, "num_hidden_layers"):
        return min(value, n_layers)
    if kind == "kv_heads" and value == _defaults(config_class).get(_own_name(config_class, "num_attention_heads")):
        kind = "heads"
    return _small_number(kind, value, rung)


def _small_number(kind: str, value: int, rung: Rung) -> int:
    """A small size of this kind, or a small number of the same use."""
    match kind:
        case "keep":
            return value
        case "token":
            return value if value < SIZES["vocabulary"] else value % 100 + 10
        case "layer_index":
            return max(min(value, SIZES["layers"] - 1), -SIZES["layers"])
        case "heads" | "kv_heads" if rung.divides:
            return value if value < 4 else value // 4
        case "head_dim" | "width" | "inner" if rung.divides:
            return value if value < 16 else max(2, value // 16)
    return min(value, SIZES[kind])


def _small_entry(kind: str, value: int, rung: Rung) -> int:
    """An entry of a list that has one for each stage."""
    match kind:
        case "width" | "inner":
            return value if value < 16 else max(8, value // (16 if rung.divides else 8))
        case "layers":
            return min(value, 1)
        case "heads" if not rung.divides:
            return min(value, 2)
        case "heads" | "token" | "layer_index":
            return _small_number(kind, value, rung)
    return value


def _filled(config: PreTrainedConfig, values: Mapping[str, Any], rung: Rung) -> dict[str, Any]:
    """Sizes that are still None, where the rung fills them."""
    if not rung.fills:
        return {}
    return {
        field.name: SIZES[kind]
        for field in dataclasses.fields(config)
        if field.name not in values
        and getattr(config, field.name, 0) is None
        and "int" in str(field.type)
        and (kind := _kind(field.name)) in SIZES
    }


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Fresh models have equal biases and norms, which would hide tensors that were confused."""
    torch.manual_seed(seed)
    stored = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in stored and tensor.dtype.is_floating_point:
                tensor.copy_(torch.rand(tensor.shape) * 0.1)
