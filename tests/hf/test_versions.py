"""Which transformers fastload.hf knows, what it stands on in it, and what it does with any other."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import conversion_mapping, core_model_loading, initialization
from transformers.integrations import accelerate
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils.loading_report import LoadStateDictInfo

from fastload.hf.versions import unsupported_reason

ROOT = Path(__file__).parent.parent.parent


def test_the_installed_version_is_known() -> None:
    assert unsupported_reason() == ""


def test_the_tests_run_with_the_oldest_version_that_the_package_asks_for() -> None:
    asked = re.search(r'"transformers>=([\d.]+),<', (ROOT / "pyproject.toml").read_text())
    tested = re.search(r"transformers==([\d.]+)", (ROOT / "Makefile").read_text())
    assert asked
    assert tested
    assert tested[1] == f"{asked[1]}.0"


@pytest.mark.parametrize("version", ["5.16.1", "5.24.0", "6.0.0"])
def test_another_version_is_left_to_itself_and_the_reason_is_counted(version: str, tmp_path: Path) -> None:
    # A process of its own, since what the version says is asked once.
    script = f"""
from fastload import hf
from transformers import BertConfig, BertModel
import transformers  # after the model: transformers puts another module in its place when it loads the first
transformers.__version__ = {version!r}
with hf.enabled():
    model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained({str(tmp_path)!r})
    again = BertModel.from_pretrained({str(tmp_path)!r})
assert (model.embeddings.word_embeddings.weight == again.embeddings.word_embeddings.weight).all()
stats = hf.stats()
assert (stats.fast_loads, stats.handed_over_loads, stats.fast_saves) == (0, 1, 0), stats
print(*stats.reasons)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"transformers {version} is not among the versions that fastload knows" in done.stdout


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (PreTrainedModel._load_pretrained_model, "model state_dict checkpoint_files load_config expected_keys"),
        (PreTrainedModel._finalize_model_loading, "model load_config loading_info"),
        (PreTrainedModel.get_init_context, "dtype is_quantized _is_ds_init_called allow_all_kernels"),
        (PreTrainedModel._initialize_missing_keys, "is_quantized"),
        (PreTrainedModel._move_missing_keys_from_meta_to_device, "missing_keys device_map device_mesh hf_quantizer"),
        (PreTrainedModel.mark_tied_weights_as_initialized, "loading_info"),
        (PreTrainedModel._adjust_missing_and_unexpected_keys, "loading_info"),
        (PreTrainedModel.tie_weights, "missing_keys recompute_mapping"),
        (_BaseAutoModelClass.from_pretrained, "pretrained_model_name_or_path model_args kwargs"),
        (
            core_model_loading.rename_source_key,
            "source_key weight_renamings weight_converters base_model_prefix meta_state_dict reverse",
        ),
        (core_model_loading.revert_weight_conversion, "model state_dict"),
        (core_model_loading.WeightRenaming, "source_patterns target_patterns"),
        (core_model_loading.WeightConverter, "source_patterns target_patterns operations force_cpu"),
        (core_model_loading.MergeModulelist, "dim"),
        (core_model_loading.Concatenate, "dim num_shards_attribute"),
        (core_model_loading.Chunk, "dim num_shards_attribute"),
        (conversion_mapping.get_model_conversion_mapping, "model key_mapping hf_quantizer add_legacy"),
        (accelerate.get_device, "device_map param_name valid_torch_device"),
        (accelerate.expand_device_map, "device_map param_names"),
        (
            accelerate.accelerate_disk_offload,
            "model disk_offload_folder checkpoint_files device_map sharded_metadata weight_mapping",
        ),
        (
            accelerate.accelerate_dispatch,
            "model hf_quantizer device_map offload_folder offload_index offload_buffers",
        ),
        (initialization.no_init_weights, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_fastload_calls_or_answers_for_takes_what_it_did(function: Callable[..., Any], expected: str) -> None:
    assert parameters(function) == expected.split()


def test_the_seam_is_called_without_a_model_of_its_class() -> None:
    # The class that fastload puts in its place answers with static methods too.
    for name in ("_load_pretrained_model", "_finalize_model_loading"):
        assert isinstance(vars(PreTrainedModel)[name], staticmethod)
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    assert source.index("cls._load_pretrained_model(") < source.index("cls._finalize_model_loading(")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            LoadStateDictConfig,
            "pretrained_model_name_or_path download_kwargs use_safetensors ignore_mismatched_sizes sharded_metadata "
            "device_map disk_offload_folder offload_buffers dtype dtype_plan hf_quantizer device_mesh weights_only "
            "weight_mapping disable_mmap",
        ),
        (
            LoadStateDictInfo,
            "missing_keys unexpected_keys mismatched_keys error_msgs conversion_errors skipped_pp_keys",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_load_is_told_and_what_it_tells_have_the_fields_they_had(said: type, expected: str) -> None:
    assert [field.name for field in dataclasses.fields(said)] == expected.split()


def test_transforms_record_that_they_were_used() -> None:
    renaming = core_model_loading.WeightRenaming("gamma", "weight")
    assert not renaming.was_used()
    assert renaming.rename_source_key("norm.gamma") == ("norm.weight", "gamma")
    assert renaming.was_used()
