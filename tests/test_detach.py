"""Models that no longer stand on their files."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastload
from fastload import detaching
from fastload.plan.fusing import Fusion, Stack
from tests.conftest import same_bytes

Writer = Callable[..., Path]


class Net(nn.Module):
    """A tie, a view of a parameter as an attribute, a buffer, a tensor without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.first = nn.Linear(32, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(7))
        self.register_buffer("none", torch.ones(0, 4))


def is_mapped(path: Path) -> bool:
    with open("/proc/self/maps") as maps:
        return str(path) in maps.read()


@pytest.fixture
def folder(write_safetensors: Writer) -> Path:
    torch.manual_seed(0)
    state = Net().state_dict()
    del state["head.weight"]
    return write_safetensors(state)


@pytest.fixture
def net(folder: Path) -> Net:
    with torch.device("meta"):
        module = Net()
    fastload.load_model(module, folder)
    assert is_mapped(folder)
    return module


def test_no_mapping_is_left_and_the_values_are_the_same(net: Net, folder: Path) -> None:
    expected = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    assert fastload.detach(net) == sum(tensor.nbytes for tensor in expected.values())
    gc.collect()
    assert not is_mapped(folder)
    assert all(same_bytes(net.state_dict()[key], tensor) for key, tensor in expected.items())


def test_the_file_may_then_be_rewritten_in_place(net: Net, folder: Path) -> None:
    fastload.detach(net)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.write(b"\xff" * size)
    os.truncate(file, 0)
    assert all(same_bytes(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_parameters_stay_the_objects_they_are_and_ties_stay_tied(net: Net) -> None:
    parameters = dict(net.named_parameters(remove_duplicate=False))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    net.first.weight.requires_grad_(False)
    net.first.bias.grad = torch.ones(32)
    fastload.detach(net)
    assert all(value is parameters[name] for name, value in net.named_parameters(remove_duplicate=False))
    assert net.head.weight is net.embed.weight
    assert (net.first.weight.requires_grad, net.first.bias.requires_grad) == (False, True)
    before = net.first.bias.detach().clone()
    optimiser.step()
    assert torch.allclose(net.first.bias, before - 0.1)


def test_tensors_that_shared_memory_share_it_still(net: Net, folder: Path) -> None:
    net.row = net.embed.weight.detach()[3]
    net.turned = net.first.weight.detach().t()
    fastload.detach(net)
    with torch.no_grad():
        net.embed.weight[3] = 5
        net.first.weight[1, 2] = 7
    assert net.row.tolist() == [5.0] * 32
    assert net.turned[2, 1] == 7
    gc.collect()
    assert not is_mapped(folder)


def test_what_was_changed_in_place_stays_changed(net: Net) -> None:
    with torch.no_grad():
        net.scale[2] = 42
    fastload.detach(net)
    assert net.scale.tolist() == [1, 1, 42, 1, 1, 1, 1]


def test_a_second_time_and_a_module_without_files_cost_nothing(net: Net) -> None:
    fastload.detach(net)
    pointers = [parameter.data_ptr() for parameter in net.parameters()]
    assert fastload.detach(net) == 0
    assert [parameter.data_ptr() for parameter in net.parameters()] == pointers
    assert fastload.detach(Net()) == 0
    assert fastload.detach(nn.Module()) == 0


def test_modules_that_others_mapped_are_detached_too(folder: Path, tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.bin")
    net = Net()
    net.load_state_dict(torch.load(tmp_path / "net.bin", mmap=True, weights_only=True), assign=True)
    assert is_mapped(tmp_path / "net.bin")
    fastload.detach(net)
    gc.collect()
    assert not is_mapped(tmp_path / "net.bin")
    net.load_state_dict(load_file(folder / "model.safetensors"), assign=True, strict=False)
    fastload.detach(net)
    gc.collect()
    assert not is_mapped(folder)


def test_memory_that_processes_share_on_purpose_stays_shared() -> None:
    net = Net().share_memory()
    assert fastload.detach(net) == 0
    assert net.embed.weight.is_shared()


def test_tensors_on_meta_and_sparse_ones_are_left_alone() -> None:
    net = Net().to("meta")
    net.sparse = torch.eye(3).to_sparse()
    assert fastload.detach(net) == 0


def test_inference_tensors_are_detached(folder: Path) -> None:
    with torch.inference_mode():
        with torch.device("meta"):
            net = Net()
        fastload.load_model(net, folder)
        fastload.detach(net)
    gc.collect()
    assert not is_mapped(folder)


def test_fused_tensors_are_detached(write_safetensors: Writer) -> None:
    state = {f"experts.{i}.w": torch.randn(32, 64) for i in range(4)}
    folder = write_safetensors(state)
    module = nn.Module()
    module.w = nn.Parameter(torch.empty(4, 32, 64, device="meta"))
    fusion = Fusion(("experts.*.w",), "w", (Stack(0),))
    report = fastload.load_model(module, folder, fusions=[fusion], detached=True)
    gc.collect()
    assert not is_mapped(folder)
    assert set(report.bytes_by_action) == {"copy"}
    assert same_bytes(module.w, torch.stack([state[f"experts.{i}.w"] for i in range(4)]))


def test_a_load_can_be_detached_from_the_start(folder: Path) -> None:
    with torch.device("meta"):
        net = Net()
    report = fastload.load_model(net, folder, detached=True)
    gc.collect()
    assert not is_mapped(folder)
    assert set(report.bytes_by_action) == {"copy"}
    assert report.mapped_share == 0
    assert "detach" in report.stages_ms


def test_from_pretrained_can_be_detached(tmp_path: Path) -> None:
    config = fastload.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    original = fastload.BertModel(config)
    original.save_pretrained(tmp_path)
    model = fastload.AutoModel.from_pretrained(tmp_path, detached=True)
    gc.collect()
    assert not is_mapped(tmp_path)
    assert all(same_bytes(tensor, original.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_where_the_platform_does_not_tell_everything_is_copied(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detaching, "_file_mappings", lambda: None)
    before = net.embed.weight.data_ptr()
    assert fastload.detach(net) > 0
    assert net.embed.weight.data_ptr() != before
    assert fastload.detach(net) > 0
