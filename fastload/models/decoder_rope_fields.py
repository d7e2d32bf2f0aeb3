"""Rotary position embeddings as configs spell them: old fields and new ones become one form, and are checked.

The one form is ``rope_parameters``: ``{"rope_type": ..., "rope_theta": ..., ...}``, or an object of such for each type
of layer. Knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastload.errors import ConfigError

__all__ = ["OLD_FIELDS", "check_rope", "layered_rope", "rope_by_layer_type", "standard_rope"]

# Fields of configs that were written before there was rope_parameters.
OLD_FIELDS = ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor")

# What each kind cannot do without, beside rope_theta.
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_NUMBERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)
# Kinds that stretch a context of this length.
_STRETCHING = ("llama3", "yarn", "longrope")


def standard_rope(
    parameters: Any,
    *,
    theta: Any,
    partial: Any,
    layer_types: Collection[str],
    n_positions: int,
    n_trained: Any = None,
) -> dict[str, Any]:
    """A config's parameters in the one form, completed; the argument is left alone.

    Args:
        parameters: ``rope_parameters`` or ``rope_scaling``, of whatever spelling; None for the default kind.
        theta: the base where the parameters have none.
        partial: the share of each head that is rotated, where the parameters do not say; None where nothing says.
        layer_types: the types of layers that the parameters may be grouped by.
        n_positions: the config's ``max_position_embeddings``.
        n_trained: the config's own ``original_max_position_embeddings``, which counts more than the parameters'.

    Raises:
        ConfigError: the parameters are no object.
    """
    found = dict(_object(parameters or {}))
    grouped = [name for name in found if name in layer_types]
    for name in grouped:
        # A group may be null: its layers have no positions.
        if found[name] is not None:
            found[name] = _completed(_object(found[name]), theta, partial, n_positions)
    if grouped:
        return found
    completed = _completed(found, theta, partial, n_positions)
    if n_trained is not None and completed["rope_type"] in _STRETCHING:
        completed["original_max_position_embeddings"] = n_trained
    return completed


def layered_rope(
    parameters: Any, scaling: Mapping[str, Any], thetas: Mapping[str, Any], *, n_positions: int
) -> dict[str, Any]:
    """The same for a family whose types of layers always have parameters of their own.

    Args:
        parameters: ``rope_parameters``, or None.
        scaling: type of layer -> ``rope_scaling`` of older files, which adds to the parameters.
        thetas: type of layer -> its base, where the parameters have none.
        n_positions: the config's ``max_position_embeddings``.

    Raises:
        ConfigError: the parameters are no object of objects.
    """
    found = dict(_object(parameters or {}))
    for name, theta in thetas.items():
        merged = {**_object(found.get(name) or {}), **_object(scaling.get(name) or {})}
        found[name] = _completed(merged, theta, None, n_positions)
    return found


def _completed(parameters: Mapping[str, Any], theta: Any, partial: Any, n_positions: int) -> dict[str, Any]:
    completed = {"rope_theta": theta, **parameters}
    completed.setdefault("rope_type", completed.get("type", "default"))
    if partial is not None:
        completed.setdefault("partial_rotary_factor", partial)
    if completed["rope_type"] in _STRETCHING:
        completed.setdefault("original_max_position_embeddings", n_positions)
    return completed


def rope_by_layer_type(parameters: Mapping[str, Any], layer_types: Collection[str]) -> dict[str, dict[str, Any]]:
    """The parameters for each type of layer; one object stands under "" for all of them.

    Raises ConfigError where a type has none.
    """
    if not any(name in layer_types for name in parameters):
        return {"": dict(parameters)}
    absent = sorted(name for name in set(layer_types) if parameters.get(name) is None)
    if absent:
        raise ConfigError(
            "rope_parameters leaves out a type of layers",
            key=f"rope_parameters.{absent[0]}",
            expected=f"parameters for each of {', '.join(sorted(set(layer_types)))}",
            found="nothing",
        )
    return {name: parameters[name] for name in sorted(set(layer_types))}


def check_rope(parameters: Mapping[str, Any], layer_types: Collection[str], head_dim: int) -> None:
    """Raise ConfigError where these parameters, in the one form, are of an unknown kind or lack what it needs."""
    for layer_type, held in rope_by_layer_type(parameters, layer_types).items():
        _check(held, "rope_parameters" + (layer_type and f".{layer_type}"), head_dim)


def _check(parameters: Mapping[str, Any], key: str, head_dim: int) -> None:
    kind = parameters.get("rope_type")
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise ConfigError(
            "unknown kind of rotary position embeddings",
            key=f"{key}.rope_type",
            expected=f"one of {', '.join(_NEEDED)}",
            found=repr(kind),
        )
    # Only yarn can tell its factor from the lengths.
    missing = [name for name in _NEEDED[kind] if parameters.get(name) is None and (kind, name) != ("yarn", "factor")]
    if missing:
        raise ConfigError(
            f"rotary position embeddings of the kind {kind} lack a parameter",
            key=f"{key}.{missing[0]}",
            expected=", ".join(_NEEDED[kind]),
            found=", ".join(sorted(parameters)),
        )
    for name in _NUMBERS:
        value = parameters.get(name)
        if value is not None and not (_is_number(value) and value > 0):
            raise _bad(f"{key}.{name}", "a number above zero", value)
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        value = parameters[name]
        is_list = isinstance(value, Sequence) and all(_is_number(factor) and factor > 0 for factor in value)
        if not is_list or len(value) != head_dim // 2:
            raise _bad(f"{key}.{name}", f"{head_dim // 2} numbers above zero", value)
    partial = parameters.get("partial_rotary_factor")
    if kind != "default" and partial not in (None, 1):
        raise _bad(f"{key}.partial_rotary_factor", "1: decoders of this family rotate whole heads", partial)


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _bad("rope_parameters", 'an object such as {"rope_type": "default", "rope_theta": 10000.0}', value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _bad(key: str, expected: str, found: Any) -> ConfigError:
    return ConfigError(
        "a parameter of the rotary position embeddings cannot be",
        key=key,
        expected=expected,
        found=repr(found)[:80],
        fix="correct the value in config.json, or pass a good one as a keyword",
    )
