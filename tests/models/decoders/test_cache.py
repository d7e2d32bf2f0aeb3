"""The cache of keys and values: memory that is laid out once, and counts its tokens."""

from __future__ import annotations

import pytest
import torch
from small_decoders import SIZES

from fastload import KVCache, LlamaConfig
from fastload.errors import OptionError
from fastload.models.cache import GrowingKVCache

N_LAYERS, N_HEADS, HEAD_SIZE = 3, 2, 16


@pytest.fixture
def config() -> LlamaConfig:
    return LlamaConfig(**SIZES)


def new(n_tokens: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, N_HEADS, n_tokens, HEAD_SIZE), torch.randn(batch, N_HEADS, n_tokens, HEAD_SIZE)


def see(cache: KVCache, n_tokens: int) -> list[tuple[torch.Tensor, ...]]:
    """Hand in tokens for all layers; returns what was handed in and what came back."""
    return [(*given, *cache.update(layer, *given)) for layer, given in enumerate([new(n_tokens)] * N_LAYERS)]


@pytest.mark.parametrize("kind", [KVCache, GrowingKVCache])
def test_keys_and_values_of_all_tokens_come_back(kind: type[KVCache], config: LlamaConfig) -> None:
    cache = kind(config, batch_size=2, max_length=9 if kind is KVCache else 0)
    steps = [see(cache, n_tokens) for n_tokens in (4, 1, 1, 3)]
    assert cache.length == 9
    assert cache.max_length >= 9
    for layer in range(N_LAYERS):
        *_, keys, values = steps[-1][layer]
        assert torch.equal(keys, torch.cat([step[layer][0] for step in steps], dim=2))
        assert torch.equal(values, torch.cat([step[layer][1] for step in steps], dim=2))


def test_what_comes_back_are_views_of_one_memory(config: LlamaConfig) -> None:
    cache = KVCache(config, 2, 9)
    homes = [{step[2].untyped_storage().data_ptr() for step in see(cache, 3)} for _ in range(3)]
    assert homes[0] == homes[1] == homes[2]
    assert len(homes[0]) == N_LAYERS


def test_tokens_count_when_the_last_layer_has_seen_them(config: LlamaConfig) -> None:
    cache = KVCache(config, 2, 9)
    for layer in range(N_LAYERS):
        assert cache.length == 0
        cache.update(layer, *new(4))
    assert cache.length == 4
    # A forward that fails half way is run again.
    cache.update(0, *new(2))
    assert cache.length == 4
    given, _, keys, _ = see(cache, 2)[0]
    assert cache.length == 6
    assert torch.equal(keys[:, :, 4:], given)


def test_a_cache_that_is_full_says_so(config: LlamaConfig) -> None:
    cache = KVCache(config, 2, 5)
    see(cache, 5)
    with pytest.raises(ValueError, match=r"no room in the cache for 6 tokens: it was made with max_length=5"):
        cache.update(0, *new(1))
    cache.reset()
    assert cache.length == 0
    see(cache, 5)


def test_memory_is_of_the_type_and_the_device_that_is_asked_for(config: LlamaConfig) -> None:
    keys, values = KVCache(config, 2, 5, dtype=torch.bfloat16, device="cpu").update(0, *new(1))
    assert keys.dtype == values.dtype == torch.bfloat16
    config.dtype = "float16"
    assert KVCache(config, 2, 5).update(0, *new(1))[0].dtype == torch.float16
    assert KVCache(config, 2, 5, device="meta").update(0, *(held.to("meta") for held in new(1)))[0].is_meta


def test_a_layer_elsewhere_takes_its_memory_there(config: LlamaConfig) -> None:
    cache = KVCache(config, 2, 5)
    for layer in range(N_LAYERS):
        given = new(2) if layer else tuple(held.to("meta") for held in new(2))
        keys, _ = cache.update(layer, *given)
        assert keys.device.type == ("cpu" if layer else "meta")


def test_sizes_that_cannot_be(config: LlamaConfig) -> None:
    for sizes in ((0, 5), (1, -1)):
        with pytest.raises(OptionError, match="room for at least one text"):
            KVCache(config, *sizes)
    with pytest.raises(ValueError, match="a batch of 3 texts, where the cache was made for 2"):
        KVCache(config, 2, 5).update(0, *new(1, batch=3))
