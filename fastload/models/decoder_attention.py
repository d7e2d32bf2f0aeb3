"""Attention of decoders: who sees whom, and the sums; keys and values may be shared by groups of heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["Sight", "attend", "see"]


class Sight(NamedTuple):
    """Which keys the tokens of a forward see. A tuple, so that what moves tensors between devices finds the one in it.

    Attributes:
        allowed: broadcasts to (batch, heads, tokens, keys): True where seen, or numbers that are added to the scores.
            None where all keys are seen, as far as the others allow.
        is_causal: each token sees itself and those before it. Never together with ``allowed``: the fastest kernels take
            a flag and no mask.
        last: only so many keys are looked at, the last; None for all.
    """

    allowed: Tensor | None = None
    is_causal: bool = False
    last: int | None = None


def see(
    mask: Tensor | None,
    *,
    tokens: int,
    n_before: int,
    window: int | None,
    is_causal: bool,
    device: torch.device,
) -> Sight:
    """What is seen with a caller's mask.

    Args:
        mask: (batch, keys), 1 for tokens and 0 for padding; or (batch, heads or 1, tokens, keys), boolean or numbers
            that are added to the scores: such a mask is final.
        tokens: how many tokens look.
        n_before: how many keys come before them, from a cache.
        window: a token sees so many keys at most, its own the last of them; without ``is_causal``, so many to each
            side. None for no limit.
        is_causal: whether a token sees only itself and those before it.
        device: where the mask is needed.

    Raises:
        ValueError: the mask has another shape.
    """
    n_keys = n_before + tokens
    if mask is not None:
        if mask.dim() not in (2, 4) or mask.shape[-1] != n_keys:
            raise ValueError(
                f"an attention mask is (batch, {n_keys}) or (batch, heads, {tokens}, {n_keys}), not "
                f"{tuple(mask.shape)}: it covers the tokens of the cache too"
            )
        mask = mask.to(device)
        if mask.dim() == 4:
            return Sight(mask if mask.is_floating_point() else mask.bool())
        mask = mask.bool()
        # Nothing masked is the usual case, and lets attention run without a mask. Looking at the values would break a
        # graph that is being traced.
        if not torch.compiler.is_compiling() and not mask.is_meta and bool(mask.all()):
            mask = None
    if window is not None and n_keys <= window:
        window = None
    if tokens == 1 and is_causal:
        # A token that comes last sees everything, and of a window it needs the keys alone.
        return Sight(None if mask is None else mask[:, None, None, -window if window else 0 :], last=window)
    if mask is None and window is None:
        if not is_causal:
            return Sight()
        if n_before == 0:
            return Sight(is_causal=True)
    distance = torch.arange(n_before, n_keys, device=device)[:, None] - torch.arange(n_keys, device=device)
    allowed = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed &= distance.abs() < window
    return Sight(allowed[None, None] if mask is None else allowed & mask[:, None, None, :])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sight: Sight,
    *,
    scale: float,
    cap: float | None,
    dropout: float,
    explicit: bool,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot product attention.

    Args:
        query: (batch, heads, tokens, head size).
        key, value: (batch, key-value heads, keys, head size); each serves as many heads as there are more of those.
        sight: which keys are seen.
        scale: what scores are multiplied by.
        cap: scores are bent so that none exceeds this; None to leave them. No fused kernel can do that.
        dropout: share of the attention weights that is dropped.
        explicit: compute the weights as a tensor and return them, instead of the fused kernel that has none.

    Returns:
        The attended values, shaped as ``query``, and the weights (batch, heads, tokens, keys) or None.
    """
    if sight.last is not None:
        begin = key.shape[2] - sight.last
        key, value = key.narrow(2, begin, sight.last), value.narrow(2, begin, sight.last)
    if explicit or cap is not None:
        return _attend_explicitly(query, key, value, sight, scale, cap, dropout)
    allowed, group = sight.allowed, query.shape[1] // key.shape[1]
    if group > 1 and query.shape[2] == 1:
        # One token: the heads of a group are as so many tokens of one head, and keys need not be repeated for them.
        grouped = query.reshape(len(query), -1, group, query.shape[3])
        if allowed is not None and allowed.shape[1] > 1:
            allowed = allowed.view(len(allowed), -1, group, allowed.shape[3])
        attended = F.scaled_dot_product_attention(
            grouped, key, value, attn_mask=allowed, dropout_p=dropout, scale=scale
        )
        return attended.reshape(query.shape), None
    if group > 1 and allowed is not None and query.device.type != "cpu":
        # With groups and a mask no fast kernel of a GPU is chosen.
        key, value = _repeated(key, group), _repeated(value, group)
        group = 1
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        dropout_p=dropout,
        is_causal=sight.is_causal,
        scale=scale,
        enable_gqa=group > 1,
    )
    return attended, None


def _repeated(states: Tensor, group: int) -> Tensor:
    return states.repeat_interleave(group, dim=1)


def _attend_explicitly(
    query: Tensor, key: Tensor, value: Tensor, sight: Sight, scale: float, cap: float | None, dropout: float
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, head_size = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, head_size)
    scores = (grouped @ key.transpose(-1, -2) * scale).view(batch, heads, tokens, -1)
    if cap is not None:
        scores = (scores / cap).tanh() * cap
    allowed = sight.allowed
    if sight.is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if allowed is not None:
        # The lowest finite number instead of minus infinity: a row that is masked whole stays free of NaN.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~allowed, least) if allowed.dtype == torch.bool else scores + allowed
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=dropout > 0)
    attended = weights.view(batch, key.shape[1], -1, weights.shape[-1]) @ value
    return attended.view(query.shape), weights
