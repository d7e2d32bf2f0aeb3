"""Loading any module: what lands where, what stays, and what is refused."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastload
from fastload.errors import IncompleteModelError, IndexFileError, KeyMatchError, OptionError
from tests.conftest import same_bytes

Writer = Callable[..., Path]


class Small(nn.Module):
    """Two layers, a loaded buffer and a computed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 4, bias=False)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("steps", torch.arange(5, device="cpu"), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def trained(build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    module = build()
    return module, {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("start", [on_meta, lambda build: build()], ids=["meta", "real"])
def test_a_module_gets_the_files_values(write_safetensors: Writer, start: Callable[..., nn.Module]) -> None:
    original, state = trained(Small)
    module = start(Small)
    report = fastload.load_model(module, write_safetensors(state))
    assert all(same_bytes(tensor, state[key]) for key, tensor in module.state_dict().items())
    assert module.steps.tolist() == list(range(5))
    x = torch.randn(2, 4)
    assert torch.equal(module.second(module.first(x)), original.second(original.first(x)))  # type: ignore[operator,union-attr]
    assert report is fastload.report(module)
    assert report.n_tensors == 4


@pytest.mark.parametrize("strict", [True, False])
def test_entries_of_a_bin_file_that_are_no_tensors_are_unexpected(tmp_path: Path, strict: bool) -> None:
    module, state = on_meta(Small), trained(Small)[1]
    torch.save({**state, "epoch": 3, "config": {"width": 4}}, tmp_path / "pytorch_model.bin")
    if strict:
        with pytest.raises(KeyMatchError, match=r"epoch(.|\n)*config"):
            fastload.load_model(module, tmp_path)
        assert module.first.weight.is_meta
    else:
        assert fastload.load_model(module, tmp_path, strict=False).unexpected_keys == ("epoch", "config")


def test_on_meta_everything_is_mapped_and_nothing_is_private(write_safetensors: Writer) -> None:
    module = on_meta(lambda: nn.Linear(1024, 4096))
    folder = write_safetensors(nn.Linear(1024, 4096).state_dict())
    report = fastload.load_model(module, folder)
    assert report.mapped_share == 1.0
    assert report.private_bytes is not None
    assert report.private_bytes < 2_000_000


def test_parameters_that_have_memory_are_filled_in_place(write_safetensors: Writer) -> None:
    _, state = trained(Small)
    module = Small().to(torch.float64)
    held = module.first.weight
    report = fastload.load_model(module, write_safetensors(state))
    assert module.first.weight is held
    assert torch.equal(held, state["first.weight"].double())
    assert set(report.bytes_by_action) == {"fill"}


def test_the_modules_dtype_holds_unless_another_is_asked_for(write_safetensors: Writer) -> None:
    _, state = trained(Small)
    folder = write_safetensors({key: tensor.bfloat16() for key, tensor in state.items()})
    kept = on_meta(Small)
    fastload.load_model(kept, folder)
    assert kept.first.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(kept.first.weight, state["first.weight"].bfloat16().float())  # type: ignore[union-attr,arg-type]
    asked = on_meta(Small)
    assert fastload.load_model(asked, folder, dtype="bfloat16").mapped_share == 1.0
    assert asked.first.weight.dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize("stored", ["embed.weight", "head.weight"])
def test_ties_hold_whichever_name_is_in_the_file(write_safetensors: Writer, stored: str) -> None:
    weight = torch.randn(6, 4)
    module = on_meta(Tied)
    report = fastload.load_model(module, write_safetensors({stored: weight}))
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.embed.weight, weight)  # type: ignore[arg-type,union-attr]
    assert report.missing_keys == ()


def test_equal_copies_of_a_tied_tensor_become_one(write_safetensors: Writer) -> None:
    weight = torch.randn(6, 4)
    weight[0, 0] = float("nan")
    module = on_meta(Tied)
    fastload.load_model(module, write_safetensors({"embed.weight": weight, "head.weight": weight.clone()}))
    assert module.head.weight is module.embed.weight


def test_tied_tensors_that_differ_in_the_file_stay_untied_and_are_noted(write_safetensors: Writer) -> None:
    embed, head = torch.randn(6, 4), torch.randn(6, 4)
    module = on_meta(Tied)
    report = fastload.load_model(module, write_safetensors({"embed.weight": embed, "head.weight": head}))
    assert torch.equal(module.embed.weight, embed)  # type: ignore[arg-type,union-attr]
    assert torch.equal(module.head.weight, head)  # type: ignore[arg-type,union-attr]
    assert "left untied" in report.notes[0]


def test_a_parameter_keeps_its_attributes_and_its_requires_grad(write_safetensors: Writer) -> None:
    module = on_meta(Small)
    module.first.weight.requires_grad_(False).tag = "frozen"  # type: ignore[union-attr]
    fastload.load_model(module, write_safetensors(Small().state_dict()))
    assert not module.first.weight.requires_grad  # type: ignore[union-attr]
    assert module.first.weight.tag == "frozen"  # type: ignore[union-attr]
    assert module.second.weight.requires_grad  # type: ignore[union-attr]


def test_quantised_weights_keep_their_type_and_take_no_gradient(write_safetensors: Writer) -> None:
    module = on_meta(lambda: nn.Linear(4, 4, bias=False))
    folder = write_safetensors({"weight": torch.ones(4, 4).to(torch.float8_e4m3fn)})
    fastload.load_model(module, folder, dtype="bfloat16")
    assert module.weight.dtype == torch.float8_e4m3fn
    assert fastload.report(module).mapped_share == 1.0


def test_a_refused_load_changes_nothing(write_safetensors: Writer) -> None:
    module = Small()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(KeyMatchError, match=r"missing in the files: second\.weight"):
        fastload.load_model(module, write_safetensors({"first.weight": torch.zeros(8, 4), "x": torch.zeros(1)}))
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def test_without_strict_missing_parameters_keep_the_values_they_have(write_safetensors: Writer) -> None:
    module = Small()
    bias = module.first.bias.clone()
    report = fastload.load_model(module, write_safetensors({"first.weight": torch.zeros(8, 4)}), strict=False)
    assert torch.equal(module.first.bias, bias)
    assert set(report.missing_keys) == {"first.bias", "scale", "second.weight"}


def test_without_strict_missing_parameters_on_meta_are_still_an_error(write_safetensors: Writer) -> None:
    with pytest.raises(IncompleteModelError, match=r"second\.weight"):
        fastload.load_model(on_meta(Small), write_safetensors({"first.weight": torch.zeros(8, 4)}), strict=False)


def test_a_computed_buffer_left_on_meta_is_an_error(write_safetensors: Writer) -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", torch.arange(4), persistent=False)

    with pytest.raises(IncompleteModelError, match="angles"):
        fastload.load_model(on_meta(Careless), write_safetensors({}), strict=False)


def test_a_plain_attribute_left_on_meta_is_an_error(write_safetensors: Writer) -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.angles = torch.arange(4)

    with pytest.raises(IncompleteModelError, match="angles"):
        fastload.load_model(on_meta(Careless), write_safetensors({}))


def test_a_module_that_was_not_loaded_has_no_report() -> None:
    with pytest.raises(OptionError, match="Small"):
        fastload.report(Small())


def test_a_cast_leaves_only_its_result_in_memory(write_safetensors: Writer) -> None:
    layers = 8
    state = {f"{i}.weight": torch.randn(1024, 2048) for i in range(layers)}
    folder = write_safetensors(state)
    module = on_meta(lambda: nn.Sequential(*(nn.Linear(2048, 1024, bias=False) for _ in range(layers))))
    report = fastload.load_model(module, folder, dtype="bfloat16")
    result_bytes = layers * 1024 * 2048 * 2
    assert report.bytes_by_action == {"cast": 2 * result_bytes}
    assert report.private_bytes is not None
    assert report.private_bytes < result_bytes + 8_000_000
    assert all(same_bytes(tensor, state[key].bfloat16()) for key, tensor in module.state_dict().items())


def test_a_state_dict_is_equal_to_the_official_readers(
    write_safetensors: Writer, tensors: dict[str, torch.Tensor]
) -> None:
    folder = write_safetensors(tensors)
    expected = load_file(folder / "model.safetensors")
    for path in (folder, folder / "model.safetensors", str(folder)):
        loaded = fastload.load_state_dict(path)
        assert loaded.keys() == expected.keys()
        assert all(same_bytes(loaded[key], expected[key]) for key in expected)


def test_a_state_dict_can_be_cast(write_safetensors: Writer, tensors: dict[str, torch.Tensor]) -> None:
    loaded = fastload.load_state_dict(write_safetensors(tensors), dtype=torch.float16)
    assert loaded["half"].dtype == loaded["layer.weight"].dtype == torch.float16
    assert loaded["count"].dtype == torch.int64
    assert torch.equal(loaded["half"], tensors["half"].half())


def test_a_checkpoint_is_a_lazy_mapping(write_safetensors: Writer, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = fastload.open_checkpoint(write_safetensors(tensors))
    assert set(checkpoint) == set(tensors)
    assert len(checkpoint) == len(tensors)
    assert checkpoint.specs["half"].dtype.code == "BF16"
    assert torch.equal(checkpoint["layer.weight"], tensors["layer.weight"])
    part = checkpoint.slice("layer.weight")
    assert part.shape == (8, 4)
    assert torch.equal(part[2:4, 1:], tensors["layer.weight"][2:4, 1:])
    assert "absent" not in checkpoint
    assert checkpoint.n_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_opening_imports_no_torch(write_safetensors: Writer) -> None:
    import subprocess
    import sys

    folder = write_safetensors({"a": torch.zeros(2)})
    code = f"import sys, fastload; print(list(fastload.open_checkpoint({str(folder)!r})), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['a'] False"


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    import json

    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_key_of_the_index_that_is_in_no_shard_is_refused(write_safetensors: Writer) -> None:
    folder = write_safetensors({"a": torch.zeros(1)})
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    write_index(folder, {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"})
    with pytest.raises(IndexFileError, match=r"key:\s+b\b"):
        fastload.open_checkpoint(folder)


def test_of_two_shards_with_one_key_the_index_decides(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": torch.zeros(1), "x": torch.zeros(1)}, tmp_path / names[0])
    save_file({"a": torch.ones(1), "y": torch.zeros(1)}, tmp_path / names[1])
    write_index(tmp_path, {"a": names[1], "x": names[0], "y": names[1]})
    assert fastload.open_checkpoint(tmp_path)["a"].item() == 1


def test_loads_from_eight_threads_are_all_right(write_safetensors: Writer) -> None:
    _, state = trained(Small)
    folder = write_safetensors(state)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(10):
            module = on_meta(Small)
            fastload.load_model(module, folder)
            wrong.extend(key for key, tensor in module.state_dict().items() if not same_bytes(tensor, state[key]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_many_loads_leave_nothing_behind(write_safetensors: Writer) -> None:
    folder = write_safetensors(Small().state_dict())
    for _ in range(50):
        fastload.load_model(on_meta(Small), folder)
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert sum(str(folder) in line for line in maps) == 0


def test_a_recurrent_module_computes_with_the_loaded_weights(tmp_path: Path) -> None:
    """It keeps a list of its weights beside the parameters."""
    real = nn.LSTM(4, 8, num_layers=2, bidirectional=True)
    fastload.save_state_dict(real.state_dict(), tmp_path)
    with torch.device("meta"):
        built = nn.LSTM(4, 8, num_layers=2, bidirectional=True)
    fastload.load_model(built, tmp_path)
    assert all(ours is own for ours, own in zip(built._flat_weights, built.parameters(), strict=True))
    inputs = torch.randn(3, 2, 4)
    assert torch.equal(built(inputs)[0], real(inputs)[0])


def test_a_load_opens_each_file_once(tmp_path: Path) -> None:
    fastload.save_model(Small(), tmp_path, max_shard_size=64)
    shards = sorted(str(path) for path in tmp_path.glob("*.safetensors"))
    module, opened = on_meta(Small), list[str]()
    is_counting = True

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if is_counting and event == "open" and str(arguments[0]).endswith(".safetensors"):
            opened.append(str(arguments[0]))

    sys.addaudithook(count)
    fastload.load_model(module, tmp_path)
    is_counting = False
    assert len(shards) > 2
    assert sorted(opened) == shards
