"""fastload plan and fastload load: what would be done, and doing it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastload.storage.mapping import MappedFile

Command = Callable[..., Any]


def change_config(folder: Path, **fields: Any) -> None:
    """Set fields of a config; None removes one."""
    values = json.loads((folder / "config.json").read_text()) | fields
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_same_dtype_is_mapped_and_needs_no_memory(command: Command, bert: Path) -> None:
    values = command("plan", bert, "--json").values
    assert values["target"] == "BertModel"
    assert set(values["bytes_by_action"]) == {"map"}
    assert values["n_new_bytes"] == 0
    assert values["missing"] == values["unexpected"] == []


def test_another_dtype_is_a_cast_and_needs_its_memory(command: Command, bert: Path) -> None:
    values = command("plan", bert, "--json", "--dtype", "bf16").values
    assert values["bytes_by_action"] == {"cast": values["n_bytes"]}
    assert values["n_new_bytes"] == values["n_bytes"] // 2
    assert {row["reason"] for row in values["rows"]} == {"F32 to BF16"}


def test_the_table_says_what_and_why(command: Command, bert: Path) -> None:
    out = command("plan", bert, "--dtype", "fp16").out
    assert "cast" in out
    assert "F32 to F16" in out
    assert "into a BertModel: 39 tensors" in out
    assert "encoder.layer.1.output.dense.weight" not in out
    assert "encoder.layer.1.output.dense.weight" in command("plan", bert, "--all").out


def test_a_plan_reads_no_weights(command: Command, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: MappedFile, *arguments: object) -> None:
        raise AssertionError("a file was mapped")

    monkeypatch.setattr(MappedFile, "__init__", refuse)
    assert command("plan", bert).status == 0


def test_keys_that_do_not_fit_are_listed(command: Command, bert: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["pooler.dense.bias"]
        for layer in range(2):
            del tensors[f"encoder.layer.{layer}.output.dense.bias"]
        tensors["surplus"] = torch.zeros(2)
        tensors["pooler.dense.weight"] = torch.zeros(3, 16)

    change_weights(bert, change)
    out = command("plan", bert).out
    assert "missing    encoder.layer.{0...1}.output.dense.bias" in out
    assert "missing    pooler.dense.bias" in out
    assert "unexpected surplus" in out
    assert "mismatched pooler.dense.weight: [3, 16] in the file, [16, 16] in the model" in out


def test_a_misaligned_tensor_is_copied_and_the_reason_given(command: Command, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (5 - len(header) % 4)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    values = command("plan", tmp_path, "--json").values
    (row,) = values["rows"]
    assert (row["action"], row["reason"]) == ("copy", "not on a multiple of 4 bytes in the file")
    assert values["target"] == "state dict"


def test_the_class_is_the_one_the_config_names(command: Command, bert: Path) -> None:
    change_config(bert, architectures=["BertForMaskedLM"])
    values = command("plan", bert, "--json").values
    assert values["target"] == "BertForMaskedLM"
    assert "cls.predictions.transform.dense.weight" in values["missing"]


@pytest.mark.parametrize("architectures", [None, ["SomethingNew"]])
def test_the_base_model_stands_in_for_a_class_unknown(
    command: Command, bert: Path, architectures: list[str] | None
) -> None:
    change_config(bert, architectures=architectures)
    assert command("plan", bert, "--json").values["target"] == "BertModel"


@pytest.mark.parametrize("name", ["plan", "load"])
def test_another_family_is_a_plain_state_dict(command: Command, bert: Path, name: str) -> None:
    change_config(bert, model_type="no-such-family", architectures=["Other"])
    assert command(name, bert, "--json").values["target"] == "state dict"


def test_a_config_that_cannot_be_read_is_an_error(command: Command, bert: Path) -> None:
    (bert / "config.json").write_text("{")
    done = command("plan", bert)
    assert done.status == 1
    assert "the config is not JSON" in done.err


def test_loading_prints_the_report(command: Command, bert: Path) -> None:
    done = command("load", bert)
    assert done.status == 0
    assert done.out.startswith(f"loaded {bert}\n")
    assert "100% mapped without copying" in done.out
    assert "target   BertModel" in done.out


def test_the_report_of_a_load_is_json_on_request(command: Command, bert: Path) -> None:
    values = command("load", bert, "--json", "--dtype", "float16").values
    assert values["target"] == "BertModel"
    assert set(values["bytes_by_action"]) == {"cast"}
    assert values["n_tensors"] == 39


def test_a_state_dict_is_loaded_where_there_is_no_config(
    command: Command, write_safetensors: Callable[..., Path], tensors: dict[str, torch.Tensor]
) -> None:
    values = command("load", write_safetensors(tensors), "--json", "--dtype", "bf16").values
    assert values["target"] == "state dict"
    assert values["n_tensors"] == len(tensors)
    # What is no float, or has the type already, stays where it is.
    assert values["bytes_by_action"]["cast"] == 8 * 4 * 4 + 8 * 4
    assert values["bytes_by_action"]["map"] == 30 + 8 + 3


def test_ranks_are_planned_without_a_group(command: Command, bert: Path) -> None:
    values = command("plan", bert, "--ranks", "8", "--tp", "2", "--ranks-per-node", "4", "--json").values
    counts = values["counts"]
    assert counts["a rank owns"]["all"] >= values["n_bytes"]
    assert counts["a rank owns"]["most"] < values["n_bytes"] / 4
    assert counts["a node of 4 reads"]["all"] <= counts["a rank reads"]["all"]
    assert counts["opens"]["all"] == 8


def test_ranks_of_a_model_that_is_not_native_are_refused(command: Command, bert: Path) -> None:
    change_config(bert, model_type="unknown", architectures=None)
    result = command("plan", bert, "--ranks", "8")
    assert result.status == 2
    assert "native models only" in result.err


def test_a_table_of_ranks(command: Command, bert: Path) -> None:
    out = command("plan", bert, "--ranks", "4", "--tp", "2").out
    assert "a node of 8 reads" in out
    assert "on 4 ranks: 2 by tensor parallelism, 2 by fully_shard" in out
