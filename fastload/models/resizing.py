"""Changing the size of a model's vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastload.errors import OptionError

if TYPE_CHECKING:
    from fastload.models.base import PreTrainedModel

__all__ = ["resize_token_embeddings"]


def resize_token_embeddings(
    model: PreTrainedModel, n_tokens: int | None, multiple: int | None, mean_resizing: bool
) -> nn.Embedding:
    """See ``PreTrainedModel.resize_token_embeddings``.

    The Parameters stay the same objects, so that what is tied stays tied and an optimiser keeps its hold of them.
    transformers draws the rows of new tokens from a normal distribution so narrow around the mean of the old rows
    that it is the mean but for rounding; here it is the mean.
    """
    embeddings = model.get_input_embeddings()
    old_size = embeddings.num_embeddings
    new_size = old_size if n_tokens is None else n_tokens
    if multiple is not None:
        new_size = -(-new_size // multiple) * multiple
    if new_size < 1:
        raise OptionError("a vocabulary has at least one token", key="new_num_tokens", found=new_size)
    if new_size == old_size:
        return embeddings

    std = 0.0 if mean_resizing else model._initialisation_std
    _resize_rows(embeddings.weight, new_size, mean_resizing, std)
    embeddings.num_embeddings = new_size
    if embeddings.padding_idx is not None and embeddings.padding_idx >= new_size:
        embeddings.padding_idx = None
    head = model.get_output_embeddings()
    if head is not None:
        tied = head.weight is embeddings.weight
        if not tied:
            _resize_rows(head.weight, new_size, mean_resizing, std)
        head.out_features = new_size
        if head.bias is not None:
            # Beside tied weights a bias begins at zero, as it does in a fresh model.
            _resize_rows(head.bias, new_size, mean_resizing and not tied, 0.0)
        # The family may hold a part of the head under a second name.
        model.set_output_embeddings(head)
    model.config.update({"vocab_size": new_size})
    return embeddings


def _resize_rows(parameter: Tensor, n_rows: int, to_mean: bool, std: float) -> None:
    """Cut or extend the first dimension, in the same Parameter. New rows are the mean of the old, or random."""
    old = parameter.data
    new = old.new_zeros(n_rows, *old.shape[1:])
    if n_rows > len(old):
        if to_mean:
            new[len(old) :] = old.float().mean(dim=0).to(old.dtype)
        elif std:
            new[len(old) :].normal_(0.0, std)
    new[: len(old)] = old[:n_rows]
    parameter.data = new
    parameter.grad = None
