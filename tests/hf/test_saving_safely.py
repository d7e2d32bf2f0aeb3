"""save_pretrained: where it is better than transformers' own on purpose. Each test shows both."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from fastload import hf
from fastload.errors import SaveError
from fastload.hf.saving import save_pretrained
from tests.hf.saved import assert_same_model, assert_same_tensors, made, weights

ROOT = Path(__file__).parent.parent.parent


def two_generations() -> tuple[Any, Any]:
    """Two models of one architecture; all weights of the second are 2."""
    old, new = made("bert"), made("bert")
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.fill_(2)
    return old, new


def is_second(folder: Path, model: Any) -> bool:
    """Whether it is the second generation that transformers loads."""
    return all(bool((parameter == 2).all()) for parameter in type(model).from_pretrained(folder).parameters())


def weight_files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != "config.json")


def test_shards_saved_over_one_file_are_what_the_next_load_finds(tmp_path: Path) -> None:
    old, new = two_generations()
    for folder in ("fastload", "transformers"):
        old.save_pretrained(tmp_path / folder)
    new.save_pretrained(tmp_path / "transformers", max_shard_size="40KB")
    assert not is_second(tmp_path / "transformers", new)
    report = save_pretrained(new, tmp_path / "fastload", max_shard_size="40KB")
    assert report is not None
    assert report.removed == ("model.safetensors",)
    assert is_second(tmp_path / "fastload", new)


def test_one_file_saved_over_shards_leaves_no_index_and_no_shard(tmp_path: Path) -> None:
    old, new = two_generations()
    for folder in ("fastload", "transformers"):
        old.save_pretrained(tmp_path / folder, max_shard_size="40KB")
    new.save_pretrained(tmp_path / "transformers")
    assert weight_files(tmp_path / "transformers") == ["model.safetensors", "model.safetensors.index.json"]
    save_pretrained(new, tmp_path / "fastload")
    assert weight_files(tmp_path / "fastload") == ["model.safetensors"]
    assert is_second(tmp_path / "fastload", new)


@pytest.mark.parametrize("max_shard_size", ["50GB", "40KB"])
def test_format_that_is_superseded_does_not_stay(tmp_path: Path, max_shard_size: str) -> None:
    old, new = two_generations()
    for folder in ("fastload", "transformers"):
        save_pretrained(old, tmp_path / folder, safe_serialization=False, max_shard_size=max_shard_size)
    new.save_pretrained(tmp_path / "transformers")
    assert any(".bin" in name for name in weight_files(tmp_path / "transformers"))
    save_pretrained(new, tmp_path / "fastload")
    assert weight_files(tmp_path / "fastload") == ["model.safetensors"]


def test_other_variants_and_other_files_stay(tmp_path: Path) -> None:
    old, new = two_generations()
    save_pretrained(old, tmp_path, variant="fp16")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    save_pretrained(new, tmp_path)
    kept = {"model.fp16.safetensors", "tokenizer.json", "adapter_model.safetensors"}
    assert set(os.listdir(tmp_path)) == kept | {"config.json", "model.safetensors"}


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    model = made("t5")
    model.save_pretrained(tmp_path / "transformers")
    save_pretrained(model, tmp_path / "fastload", max_shard_size="40KB")
    modes = {folder: {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / folder).iterdir()}
             for folder in ("fastload", "transformers")}  # fmt: skip
    assert modes["fastload"] == {0o666 & ~umask}
    assert 0o600 in modes["transformers"]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("name", ["bert", "moe"])
def test_folder_that_the_model_is_mapped_from_can_be_saved_to(
    tmp_path: Path, name: str, max_shard_size: str, safe: bool
) -> None:
    model = made(name)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    before = weights(tmp_path)
    with hf.enabled():
        mapped = type(model).from_pretrained(tmp_path)
        mapped.save_pretrained(tmp_path, max_shard_size=max_shard_size, safe_serialization=safe)
        mapped.save_pretrained(tmp_path, max_shard_size=max_shard_size, safe_serialization=safe)
    assert_same_tensors(weights(tmp_path), before)
    assert_same_tensors(mapped.state_dict(), model.state_dict())


def test_bin_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    model = made("t5")
    model.save_pretrained(tmp_path / "transformers", safe_serialization=False)
    assert "pytorch_model.bin" not in os.listdir(tmp_path / "transformers")
    save_pretrained(model, tmp_path / "fastload", safe_serialization=False)
    assert weight_files(tmp_path / "fastload") == ["generation_config.json", "pytorch_model.bin"]
    ours, stock = (type(model).from_pretrained(tmp_path / folder) for folder in ("fastload", "transformers"))
    assert_same_model(ours, stock)


def test_parameters_shared_without_a_declaration_are_saved_under_each_name(tmp_path: Path) -> None:
    model = made("bert")
    layers = model.bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    with pytest.raises(RuntimeError, match="shared tensors"):
        model.save_pretrained(tmp_path / "transformers")
    save_pretrained(model, tmp_path / "fastload")
    again, info = type(model).from_pretrained(tmp_path / "fastload", output_loading_info=True)
    assert not any(info.values())
    assert_same_tensors(again.state_dict(), model.state_dict())


def test_state_dict_of_the_caller_is_not_emptied(tmp_path: Path) -> None:
    model = made("bert")
    given = model.state_dict()
    model.save_pretrained(tmp_path / "transformers", state_dict=given)
    assert given == {}
    given = model.state_dict()
    save_pretrained(model, tmp_path / "fastload", state_dict=given)
    assert given.keys() == model.state_dict().keys()


def test_model_offloaded_by_hooks_alone_is_saved(tmp_path: Path) -> None:
    model = made("moe")
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="meta"):
        model.save_pretrained(tmp_path / "transformers")
    save_pretrained(model, tmp_path / "fastload")
    assert_same_tensors(type(model).from_pretrained(tmp_path / "fastload").state_dict(), expected)


def test_file_in_the_place_of_the_folder_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert made("bert").save_pretrained(tmp_path / "file") is None
    with pytest.raises(SaveError, match="this is a file"):
        save_pretrained(made("bert"), tmp_path / "file")


def killed(whose: str, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.hf.killed_hf_save", whose, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_save_killed_at_any_step_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    results = killed("fastload", tmp_path / "model")
    assert len(results) > 30
    assert {result["after_kill"] for result in results} == {1, 2}
    assert {result["after_next_save"] for result in results} == {3}
    assert [result["after_kill"] for result in results if result["finished"]] == [2] * sum(
        result["finished"] for result in results
    )


def test_transformers_killed_between_two_shards_leaves_a_mixture(tmp_path: Path) -> None:
    results = killed("transformers", tmp_path / "model")
    assert any("mixture" in str(result["after_kill"]) for result in results)
