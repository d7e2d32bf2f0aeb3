"""fastload inspect: contents from headers alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastload.cli.inspecting import group_by_module
from fastload.dtypes import DTYPES
from fastload.formats.specs import Region, TensorSpec

Command = Callable[..., Any]


def specs_of(keys: Iterable[str]) -> dict[str, TensorSpec]:
    """Specs of one F32 value each, one behind the other."""
    return {key: TensorSpec(key, DTYPES["F32"], (1,), Region("file", 4 * place, 4)) for place, key in enumerate(keys)}


def grouped(*keys: str) -> dict[str, int]:
    return {module.name: len(module.specs) for module in group_by_module(specs_of(keys))}


def row(out: str, name: str) -> list[str]:
    """The cells of a table's row."""
    return next(line for line in out.splitlines() if line.strip().startswith(name)).split()


@pytest.mark.parametrize("ending", [("--json",), (), ("--all",)])
def test_inspecting_imports_no_torch(process: Command, bert: Path, ending: tuple[str, ...]) -> None:
    arguments = ["inspect", str(bert), *ending]
    check = f"import sys; from fastload.cli import main; main({arguments!r}); sys.exit(3 * ('torch' in sys.modules))"
    done = process("-c", check)
    assert done.status == 0
    assert done.err == ""
    assert "word_embeddings" in done.out


def test_numbered_layers_are_one_module(command: Command, bert: Path) -> None:
    out = command("inspect", bert).out
    assert row(out, "encoder.layer.{0...1}") == ["encoder.layer.{0...1}", "17.8", "kB"]
    assert row(out, "attention.self.query.weight")[1:] == ["2", "16", "x", "16", "F32", "2.0", "kB"]
    assert row(out, "pooler") == ["pooler", "1.1", "kB"]


def test_all_shows_each_tensor_under_its_full_name(command: Command, bert: Path) -> None:
    out = command("inspect", bert, "--all").out
    assert row(out, "encoder.layer.1.attention.self.query.weight")[1:5] == ["1", "16", "x", "16"]
    assert "{0...1}" not in out


def test_totals_are_given_by_file_and_dtype(
    command: Command, write_safetensors: Callable[..., Path], tensors: dict[str, torch.Tensor]
) -> None:
    out = command("inspect", write_safetensors(tensors)).out
    assert row(out, "BF16") == ["BF16", "1", "tensors", "30", "B"]
    assert row(out, "file") == ["file", "6", "tensors", "201", "B", "model.safetensors"]
    assert row(out, "total") == ["total", "6", "tensors", "201", "B"]
    assert row(out, "count") == ["count", "1", "scalar", "I64", "8", "B"]
    assert row(out, "empty")[1:5] == ["1", "0", "x", "4"]


def test_json_describes_every_tensor(
    command: Command, write_safetensors: Callable[..., Path], tensors: dict[str, torch.Tensor]
) -> None:
    folder = write_safetensors(tensors, {"format": "pt", "author": "a person"})
    values = command("inspect", folder, "--json").values
    described = {tensor["key"]: tensor for tensor in values["tensors"]}
    assert {key: tuple(tensor["shape"]) for key, tensor in described.items()} == {
        key: tuple(tensor.shape) for key, tensor in tensors.items()
    }
    assert sum(tensor["n_bytes"] for tensor in described.values()) == values["n_bytes"] == 201
    assert values["files"] == {str(folder / "model.safetensors"): {"n_tensors": 6, "n_bytes": 201}}
    assert values["metadata"]["author"] == "a person"
    assert values["format"] == "safetensors"


def test_bytes_that_tensors_share_count_once(command: Command, tmp_path: Path) -> None:
    tied = torch.zeros(10, 10)
    torch.save({"head": tied, "embedding": tied, "bias": torch.zeros(5)}, tmp_path / "pytorch_model.bin")
    values = command("inspect", tmp_path, "--json").values
    assert values["n_bytes"] == 420
    assert values["n_parameters"] == 105


def test_variant_subfolder_and_format_choose_the_files(command: Command, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"plain": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"short": torch.zeros(1).half()}, tmp_path / "model.fp16.safetensors")
    torch.save({"pickled": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"below": torch.zeros(1)}, tmp_path / "sub" / "model.safetensors")
    ways = {
        (): "plain",
        ("--variant", "fp16"): "short",
        ("--no-use-safetensors",): "pickled",
        ("--subfolder", "sub"): "below",
    }
    for way, key in ways.items():
        values = command("inspect", tmp_path, "--json", *way).values
        assert [tensor["key"] for tensor in values["tensors"]] == [key]


def test_tables_need_rich_and_json_does_not(command: Command, monkeypatch: pytest.MonkeyPatch, bert: Path) -> None:
    for name in ("rich", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    done = command("inspect", bert)
    assert done.status == 1
    assert 'pip install "fastload[cli]"' in done.err
    assert command("plan", bert).status == 1
    assert command("inspect", bert, "--json").values["n_tensors"] == 39


def test_names_can_neither_command_a_terminal_nor_mark_up_a_table(command: Command, tmp_path: Path) -> None:
    save_file({"\x1b[2Jcleared": torch.zeros(1), "[red]coloured[/red]": torch.zeros(1)}, tmp_path / "model.safetensors")
    out = command("inspect", tmp_path).out
    assert "\x1b" not in out
    assert r"\x1b[2Jcleared" in out
    assert "[red]coloured[/red]" in out


def test_a_piped_table_cuts_no_name(command: Command, tmp_path: Path) -> None:
    name = "module." * 60 + "weight"
    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
    assert name in command("inspect", tmp_path, "--all").out


def test_a_module_is_a_numbered_block_or_the_largest_part_without_one() -> None:
    assert grouped("bert.embed.word.weight", "bert.layer.0.a.weight", "bert.layer.1.a.weight", "cls.bias") == {
        "bert.embed": 1,
        "bert.layer.{0...1}": 2,
        "cls": 1,
    }


def test_experts_are_blocks_in_blocks() -> None:
    keys = [f"layers.{layer}.experts.{expert}.up" for layer in range(2) for expert in range(3)]
    assert grouped("layers.0.norm", "layers.1.norm", *keys) == {
        "layers.{0...1}": 2,
        "layers.{0...1}.experts.{0...2}": 6,
    }


def test_tensors_in_no_module_are_shown_too() -> None:
    assert grouped("scale", "0", "layer.0.weight") == {"": 2, "layer.0": 1}


def test_a_layer_with_another_shape_has_a_row_that_names_it(command: Command, tmp_path: Path) -> None:
    tensors = {f"layer.{number}.weight": torch.zeros(4 if number < 3 else 5) for number in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    out = command("inspect", tmp_path).out
    assert row(out, "layer.{0...2}.weight")[1:3] == ["3", "4"]
    assert row(out, "layer.3.weight")[1:3] == ["1", "5"]
