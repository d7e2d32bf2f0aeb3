"""Keys and values of tokens that were seen: memory laid out before it is needed, written in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastload.errors import OptionError
from fastload.models.decoder_config import head_size

if TYPE_CHECKING:
    from fastload.models.config import PreTrainedConfig

__all__ = ["GrowingKVCache", "KVCache"]


class KVCache:
    """The keys and values of every layer of a decoder, in memory of a fixed size.

    A forward hands each layer's new keys and values to `update`, layer after layer. The tokens count as seen when the
    last layer has handed in its own: a forward that fails half way can be run again on the same cache.

    Attributes:
        max_length: most tokens a text may have.
        length: tokens that all layers have seen so far, padding included.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        batch_size: int,
        max_length: int,
        *,
        n_heads: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Lay out the memory. Pages of it are taken when they are first written.

        Args:
            config: of a decoder.
            batch_size: texts that are run together.
            max_length: most tokens of a text, padding and the tokens to be generated included.
            n_heads: heads of keys and values, where they are not as many as the config says: the ``n_key_heads`` of a
                ``base_model`` that is split over ranks.
            dtype: of the model's weights; by default what the config says, or else float32.
            device: where the model is. A layer that is elsewhere takes its share to its own device.

        Raises:
            OptionError: a size below zero, or no text.
        """
        if batch_size < 1 or max_length < 0:
            raise OptionError(
                "a cache needs room for at least one text",
                expected="batch_size >= 1 and max_length >= 0",
                found=f"batch_size = {batch_size}, max_length = {max_length}",
            )
        sizes: Any = config
        heads = n_heads or sizes.num_key_value_heads or sizes.num_attention_heads
        shape = (batch_size, heads, max_length, head_size(config))
        dtype = dtype or config.dtype or torch.float32
        self.max_length = max_length
        self.length = 0
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(sizes.num_hidden_layers)]
        self._values = [torch.empty_like(keys) for keys in self._keys]

    def update(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens.

        Args:
            layer_idx: number of the layer.
            key, value: (batch, key-value heads, new tokens, head size).

        Returns:
            Keys and values of all tokens so far, the new ones last: views of the cache.

        Raises:
            ValueError: there is no room for the new tokens, or they are of another batch or of other heads.
        """
        n_new = key.shape[2]
        end = self.length + n_new
        if end > self.max_length:
            self._make_room(end)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if len(keys) != len(key):
            raise ValueError(f"a batch of {len(key)} texts, where the cache was made for {len(keys)}")
        if keys.shape[1] != key.shape[1]:
            raise ValueError(f"{key.shape[1]} heads of keys, where the cache was made for {keys.shape[1]}: see n_heads")
        if keys.device != key.device:
            keys = self._keys[layer_idx] = keys.to(key.device)
            values = self._values[layer_idx] = values.to(key.device)
        keys.narrow(2, self.length, n_new).copy_(key)
        values.narrow(2, self.length, n_new).copy_(value)
        if layer_idx == len(self._keys) - 1:
            self.length = end
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0

    def _make_room(self, n_tokens: int) -> None:
        raise ValueError(
            f"no room in the cache for {n_tokens} tokens: it was made with max_length={self.max_length}; "
            "make a longer one"
        )


class GrowingKVCache(KVCache):
    """A cache whose texts have no known end: when it is full, twice the memory takes its place.

    A forward makes one where ``use_cache`` asks for a cache and none was given.
    """

    def _make_room(self, n_tokens: int) -> None:
        self.max_length = max(n_tokens, 2 * self.max_length)
        self._keys = [self._longer(held) for held in self._keys]
        self._values = [self._longer(held) for held in self._values]

    def _longer(self, held: Tensor) -> Tensor:
        batch, heads, _, head_dim = held.shape
        longer = held.new_empty(batch, heads, self.max_length, head_dim)
        longer.narrow(2, 0, self.length).copy_(held.narrow(2, 0, self.length))
        return longer
