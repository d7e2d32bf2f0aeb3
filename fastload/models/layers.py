"""Pieces that families share: activations, attention masks, attention, losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastload.errors import ConfigError

__all__ = [
    "AttentionMask",
    "activation",
    "attend",
    "causal_lm_loss",
    "classification_loss",
    "expand_mask",
    "real_device",
]

Activation = Callable[[Tensor], Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _clipped_gelu(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10, 10)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


# Functions at module level and partials of them: a model that holds one can be pickled. The tanh form of GELU goes
# by many names in transformers, which has a Python and a C version of it; here it is always the C one.
_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "linear": _identity,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu_squared,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Activation:
    """The function that a config's ``hidden_act`` names; ConfigError for one that is not known."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise ConfigError(
            "unknown activation function",
            key="hidden_act",
            expected=f"one of {', '.join(ACTIVATIONS)}",
            found=repr(name),
        ) from None


def real_device() -> torch.device:
    """Where a tensor made now would lie, and the CPU in place of meta: computed buffers are real in a skeleton too."""
    device = torch.empty(0).device
    return torch.device("cpu") if device.type == "meta" else device


@dataclass(frozen=True, slots=True)
class AttentionMask:
    """Which token attends to which.

    Attributes:
        allowed: broadcasts to (batch, heads, tokens, tokens attended to): True where allowed, or floating point
            numbers that are added to the scores. None allows all.
        is_causal: each token attends to those before it. Never together with ``allowed``, because the fastest
            attention kernels take a flag and no mask.
    """

    allowed: Tensor | None = None
    is_causal: bool = False


def expand_mask(
    mask: Tensor | None,
    *,
    tokens: int,
    n_before: int = 0,
    n_keys: int | None = None,
    causal: bool,
    device: torch.device,
) -> AttentionMask:
    """The mask for attention of a caller's mask.

    Args:
        mask: (batch, keys) or (batch, tokens, keys), 1 for tokens that are attended to and 0 for padding;
            or (batch, heads or 1, tokens, keys), boolean, or floating point numbers added to the scores. A mask of
            four dimensions is final: nothing is added to it.
        tokens: how many tokens attend.
        n_before: how many of the keys come before them, from a cache.
        n_keys: how many tokens are attended to; all tokens by default.
        causal: whether a token attends only to itself and those before it.
        device: where the mask is needed.

    Raises:
        ValueError: the mask has another shape.
    """
    n_keys = n_before + tokens if n_keys is None else n_keys
    if mask is not None:
        if mask.dim() not in (2, 3, 4) or mask.shape[-1] != n_keys:
            raise ValueError(
                f"an attention mask is (batch, {n_keys}), (batch, {tokens}, {n_keys}) or "
                f"(batch, heads, {tokens}, {n_keys}), not {tuple(mask.shape)}"
            )
        mask = mask.to(device)
        if mask.dim() == 4:
            return AttentionMask(mask if mask.is_floating_point() else mask.bool())
        mask = mask.bool()
        # Nothing masked is the usual case, and lets attention run without a mask. Looking at the values would
        # break a graph that is being traced.
        if not torch.compiler.is_compiling() and not mask.is_meta and bool(mask.all()):
            mask = None
        else:
            mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
    # A single token that comes last may attend to everything.
    if not causal or tokens == 1:
        return AttentionMask(mask)
    if mask is None and n_before == 0:
        return AttentionMask(is_causal=True)
    earlier = torch.ones(tokens, n_keys, dtype=torch.bool, device=device).tril(diagonal=n_before)
    return AttentionMask(earlier if mask is None else mask & earlier)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, dropout: float, explicit: bool
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot product attention over (batch, heads, tokens, head size).

    Args:
        query, key, value: the projections; key and value may be of more tokens than query.
        mask: which token attends to which.
        dropout: share of the attention weights that is dropped.
        explicit: compute the weights as a tensor and return them, instead of the fused kernel that has none.

    Returns:
        The attended values, shaped as ``query``, and the weights (batch, heads, tokens, keys) or None.
    """
    if not explicit:
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask.allowed, dropout_p=dropout, is_causal=mask.is_causal
        )
        return attended, None
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    allowed = mask.allowed
    if mask.is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if allowed is not None:
        # The lowest finite number instead of minus infinity: a row that is masked whole stays free of NaN.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~allowed, least) if allowed.dtype == torch.bool else scores + allowed
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=dropout > 0)
    return weights @ value, weights


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each token's logits with the label one place later; in fp32, labels of -100 left out."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].to(logits.device).flatten())


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of a sequence classifier: mean square error, cross entropy, or binary cross entropy for each label.

    Args:
        logits: (batch, labels).
        labels: (batch) of scores or of label numbers, or (batch, labels) of zeros and ones.
        problem_type: one of the config's, or None to tell from the number of labels and the type of ``labels``.
    """
    n_labels = logits.shape[-1]
    if problem_type is None:
        if n_labels == 1:
            problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"
    if problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze()) if n_labels == 1 else F.mse_loss(logits, labels)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits.view(-1, n_labels), labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)
