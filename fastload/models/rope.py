"""Rotary position embeddings (Su et al., https://arxiv.org/abs/2104.09864) and the ways in which they are stretched.

linear: https://kaiokendev.github.io/til; dynamic: NTK-aware scaling by /u/bloc97 and /u/emozilla; yarn:
https://arxiv.org/abs/2309.00071; longrope: https://arxiv.org/abs/2402.13753; llama3: the reference code of Llama 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastload.models.decoder_config import DecoderConfig, attention_types, head_size
from fastload.models.decoder_rope_fields import rope_by_layer_type

__all__ = ["Angles", "RotaryEmbedding", "rotate"]

# Cosines and sines, each (batch or 1, 1, tokens, head size). The first half of the sines is negated: see `rotate`.
Angles = tuple[Tensor, Tensor]
Parameters = Mapping[str, Any]
# One frequency for each pair of numbers of a head, and what cosines and sines are multiplied by.
Frequencies = tuple[Tensor, float]


def rotate(states: Tensor, angles: Angles) -> Tensor:
    """Turn queries or keys (batch, heads, tokens, head size) by the angles of their positions.

    Number i of a head and number i + half make a pair: (a, b) becomes (a cos - b sin, b cos + a sin). With the first
    half of the sines negated that is a product with the halves exchanged.
    """
    cosines, sines = angles
    return states * cosines + states.roll(states.shape[-1] // 2, dims=-1) * sines


class RotaryEmbedding(nn.Module):
    """The angles of positions, for each type of layer.

    The frequencies are computed, so they are real where the model is a skeleton; and float32 whatever the weights are.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.layer_types = tuple(sorted(set(attention_types(config))))
        self.head_size = head_size(config)
        self.n_positions = config.max_position_embeddings
        self.kinds = rope_by_layer_type(config.rope_parameters or {}, self.layer_types)
        self.scales: dict[str, float] = {}
        for name in self.kinds:
            frequencies, self.scales[name] = self._frequencies(name)
            self.register_buffer(_buffer_name(name), frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> dict[str, Angles]:
        """The angles by type of layer.

        Args:
            position_ids: (batch or 1, tokens).
            dtype: type of the queries and keys; the angles are computed in float32.
        """
        angles = {name: self._angles(name, position_ids[:, None, :, None], dtype) for name in self.kinds}
        return {layer_type: angles[layer_type if layer_type in angles else ""] for layer_type in self.layer_types}

    def _angles(self, name: str, positions: Tensor, dtype: torch.dtype) -> Angles:
        frequencies, scale = self._buffers[_buffer_name(name)], self.scales[name]
        reach = self._reach(name)
        if reach is not None and (n_tokens := int(positions.max()) + 1) > reach:
            frequencies, scale = self._frequencies(name, n_tokens)
        turns = positions.float() * frequencies.to(positions.device)  # type: ignore[union-attr]
        cosines, sines = turns.cos(), turns.sin()
        if scale != 1:
            cosines, sines = cosines * scale, sines * scale
        return torch.cat((cosines, cosines), -1).to(dtype), torch.cat((-sines, sines), -1).to(dtype)

    def _reach(self, name: str) -> int | None:
        """Most tokens for which the buffer holds; None where that is any number of them."""
        parameters = self.kinds[name]
        reaches = {"dynamic": self.n_positions, "longrope": parameters.get("original_max_position_embeddings")}
        return reaches.get(parameters["rope_type"])

    def _frequencies(self, name: str, n_tokens: int = 0) -> Frequencies:
        parameters = self.kinds[name]
        return _KINDS[parameters["rope_type"]](parameters, self.head_size, self.n_positions, n_tokens)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self.kinds:
            held = self._buffers[_buffer_name(name)]
            if held is not None and held.dtype != torch.float32:
                # A model that is converted keeps its angles.
                self._buffers[_buffer_name(name)] = self._frequencies(name)[0].to(held.device)
        return self


def _buffer_name(name: str) -> str:
    return f"{name}_inv_freq" if name else "inv_freq"


# The kinds: (parameters, head size, the config's number of positions, tokens of the text) -> frequencies. They are
# computed on the CPU also while a skeleton is built, and in float32, with the roundings of transformers.


def _powers(base: float, dim: int) -> Tensor:
    return base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def _default(parameters: Parameters, dim: int, n_positions: int, n_tokens: int) -> Frequencies:
    return 1.0 / _powers(parameters["rope_theta"], dim), 1.0


def _linear(parameters: Parameters, dim: int, n_positions: int, n_tokens: int) -> Frequencies:
    return 1.0 / _powers(parameters["rope_theta"], dim) / parameters["factor"], 1.0


def _dynamic(parameters: Parameters, dim: int, n_positions: int, n_tokens: int) -> Frequencies:
    """The base grows with the text, once that is longer than the model was trained for."""
    factor = parameters["factor"]
    stretch = factor * max(n_tokens, n_positions) / n_positions - (factor - 1)
    return 1.0 / _powers(parameters["rope_theta"] * stretch ** (dim / (dim - 2)), dim), 1.0


def _yarn(parameters: Parameters, dim: int, n_positions: int, n_tokens: int) -> Frequencies:
    """High frequencies stay, low ones are divided by the factor, and between the two bounds they are mixed."""
    base, length = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or n_positions / length

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = parameters.get("attention_factor")
    if attention is None:
        over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention = scale(over) / scale(under) if over and under else scale(1)

    def index_of(n_turns: float) -> float:
        """Number of the pair that turns so often in the length that the model was trained for."""
        return dim * math.log(length / (n_turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = index_of(parameters.get("beta_fast") or 32), index_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low
    kept = 1 - (ramp / (high - low if high != low else 0.001)).clamp(0, 1)
    powers = _powers(base, dim)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, attention


def _longrope(parameters: Parameters, dim: int, n_positions: int, n_tokens: int) -> Frequencies:
    """A divisor for each frequency: one list for short texts, and one for those beyond the length of training."""
    length = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or n_positions / length
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    divisors = parameters["long_factor" if n_tokens > length else "short_factor"]
    powers = _powers(parameters["rope_theta"], dim)
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32, device="cpu") * powers), attention


def _llama3(parameters: Parameters, dim: int, n_positions: int, n_tokens: int) -> Frequencies:
    """Long waves are stretched by the factor, short ones stay, and between them the two are mixed."""
    factor, length = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    frequencies = 1.0 / _powers(parameters["rope_theta"], dim)
    waves = 2 * math.pi / frequencies
    share = (length / waves - low) / (high - low)
    mixed = (1 - share) * frequencies / factor + share * frequencies
    stretched = torch.where(waves > length / low, frequencies / factor, mixed)
    return torch.where(waves < length / high, frequencies, stretched), 1.0


_KINDS: dict[str, Callable[[Parameters, int, int, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
