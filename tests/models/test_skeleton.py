"""Skeletons: the shape of a model without its values."""

from __future__ import annotations

import gc
import threading

import torch
from torch import nn

import fastload
from fastload.models.skeleton import is_building_skeleton, repeat_block, skeleton
from fastload.pauses import paused_collector

TINY = fastload.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)


class Block(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.inner = nn.Linear(2, 2, bias=False)
        self.again = self.inner
        self.register_buffer("angles", torch.arange(3, device="cpu"), persistent=False)


def test_parameters_are_on_meta_and_computed_buffers_real() -> None:
    with skeleton():
        model = fastload.BertModel(TINY)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_a_skeleton_has_the_modules_of_a_built_model() -> None:
    with skeleton():
        model = fastload.BertForMaskedLM(TINY)
    built = fastload.BertForMaskedLM(TINY)
    assert str(model) == str(built)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ours, theirs = dict(model.named_modules()), dict(built.named_modules())
    assert all(ours[name].__dict__.keys() == theirs[name].__dict__.keys() for name in theirs)


def test_no_initialiser_runs_whatever_it_is() -> None:
    with skeleton():
        weight = nn.Parameter(torch.empty(4, 4))
        for fill in (nn.init.xavier_uniform_, nn.init.orthogonal_, nn.init.trunc_normal_, nn.init.eye_, nn.init.ones_):
            assert fill(weight).is_meta
        real = nn.init.ones_(torch.empty(2, device="cpu"))
    assert real.tolist() == [1, 1]


def test_repeated_blocks_share_nothing_but_keep_what_they_share_inside() -> None:
    with skeleton():
        blocks = repeat_block(Block, 3)
    assert [block.layer_idx for block in blocks] == [0, 1, 2]
    assert all(block.again is block.inner for block in blocks)
    assert len({id(block.inner.weight) for block in blocks}) == 3
    assert len({block.angles.data_ptr() for block in blocks}) == 3
    blocks[0].register_forward_hook(lambda *_: None)
    blocks[0].train(False)
    assert not blocks[1]._forward_hooks
    assert blocks[1].training


def test_outside_a_skeleton_every_block_is_constructed() -> None:
    blocks = repeat_block(Block, 2)
    assert not torch.equal(blocks[0].inner.weight, blocks[1].inner.weight)


def test_one_threads_skeleton_is_no_other_threads() -> None:
    seen = []

    def look() -> None:
        seen.append((is_building_skeleton(), nn.Linear(2, 2).weight.is_meta))

    with skeleton():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [(False, False)]
    assert not is_building_skeleton()


def test_the_collector_is_as_it_was_after_pauses_that_overlap() -> None:
    assert gc.isenabled()
    first, second = paused_collector(), paused_collector()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
