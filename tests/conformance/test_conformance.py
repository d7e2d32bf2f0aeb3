"""A sample of the conformance run, and proof that the run sees what it is there to see.

`make conformance` runs every class.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM, PreTrainedModel

from tests.conformance.case import DIFFERS, PASSED, SKIPPED, Case, Result
from tests.conformance.classes import Reachable, reachable_classes
from tests.conformance.compare import differences, mended, model_state
from tests.conformance.loading import SEED, Fastload, Stock, listening, make_gaps
from tests.conformance.report import report
from tests.conformance.run import chosen, main, run
from tests.conformance.tiny import MOST_PARAMETERS, NotBuiltError, build

# What each is here for: ties, old names, experts, weight norm, batch norm, parts, non-persistent buffers, ...
SAMPLE = (
    "AlbertForMaskedLM",
    "BartForConditionalGeneration",
    "BertForPreTraining",
    "CLIPModel",
    "DeepseekV3ForCausalLM",
    "DetrForObjectDetection",
    "EncodecModel",
    "GPT2LMHeadModel",
    "Gemma3ForConditionalGeneration",
    "GptOssForCausalLM",
    "JambaForCausalLM",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "Mamba2ForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen3MoeForCausalLM",
    "ResNetForImageClassification",
    "RoFormerForMaskedLM",
    "SamModel",
    "SwinForImageClassification",
    "T5ForConditionalGeneration",
    "Wav2Vec2ForCTC",
    "WhisperForConditionalGeneration",
)
REACHABLE = {reachable.class_name: reachable for reachable in reachable_classes()}


@pytest.mark.parametrize("class_name", SAMPLE)
def test_fastload_gives_what_transformers_gives(class_name: str, tmp_path: Path) -> None:
    result = Case(REACHABLE[class_name], Fastload(), tmp_path / "scratch").run()
    assert (result.status, result.reason, result.differences) == (PASSED, "", {})
    assert result.fast >= 6
    assert result.handed_over == {}


@pytest.fixture(scope="module")
def bert() -> BertForMaskedLM:
    """A tiny BERT whose head is tied to its embeddings."""
    return build(BertForMaskedLM, SEED)


def requires_no_grad(model: BertForMaskedLM) -> None:
    model.bert.embeddings.LayerNorm.bias.requires_grad_(False)


def other_byte(model: BertForMaskedLM) -> None:
    model.bert.embeddings.LayerNorm.bias.data.view(torch.uint8)[5] += 1


def other_dtype(model: BertForMaskedLM) -> None:
    model.bert.embeddings.LayerNorm.bias.data = model.bert.embeddings.LayerNorm.bias.data.half()


def lost_tie(model: BertForMaskedLM) -> None:
    model.cls.predictions.decoder.weight = torch.nn.Parameter(model.cls.predictions.decoder.weight.detach().clone())


def shared_memory_of_two_parameters(model: BertForMaskedLM) -> None:
    decoder = model.cls.predictions.decoder
    decoder.weight = torch.nn.Parameter(decoder.weight.detach())


def buffer_that_is_no_parameter(model: BertForMaskedLM) -> None:
    norm = model.bert.embeddings.LayerNorm
    bias = norm.bias
    del norm.bias
    norm.register_buffer("bias", bias.detach())


def other_computed_buffer(model: BertForMaskedLM) -> None:
    model.bert.embeddings.position_ids[0, 0] = 7


def other_weight_and_buffer(model: BertForMaskedLM) -> None:
    other_byte(model)
    other_computed_buffer(model)


def tensor_attribute(model: BertForMaskedLM) -> None:
    model.bert.embeddings.scales = [torch.ones(2)]


def left_on_meta(model: BertForMaskedLM) -> None:
    model.bert.embeddings.position_ids = torch.empty_like(model.bert.embeddings.position_ids, device="meta")


def dropout_that_still_trains(model: BertForMaskedLM) -> None:
    model.bert.embeddings.dropout.train(not model.training)


def other_setting(model: BertForMaskedLM) -> None:
    model.config.pad_token_id = 3


def device_map(model: BertForMaskedLM) -> None:
    model.hf_device_map = {"": "cpu"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (other_byte, "tensors: bert.embeddings.LayerNorm.bias: 1 of 128 bytes differ, the first at 5"),
        (other_dtype, "tensors: bert.embeddings.LayerNorm.bias: dtype: expected torch.float32, found torch.float16"),
        (requires_no_grad, "tensors: bert.embeddings.LayerNorm.bias: requires_grad: expected True, found False"),
        (
            buffer_that_is_no_parameter,
            "tensors: bert.embeddings.LayerNorm.bias: kind: expected parameter, found buffer",
        ),
        (
            lost_tie,
            "same_storages: lost bert.embeddings.word_embeddings.weight = cls.predictions.decoder.weight",
        ),
        (
            shared_memory_of_two_parameters,
            "same_objects: lost bert.embeddings.word_embeddings.weight = cls.predictions.decoder.weight",
        ),
        (other_computed_buffer, "tensors: bert.embeddings.position_ids: 1 of 512 bytes differ, the first at 0"),
        (left_on_meta, "tensors: bert.embeddings.position_ids: device: expected cpu, found meta"),
        (tensor_attribute, "tensors: extra bert.embeddings.scales[0]"),
        (dropout_that_still_trains, "training: bert.embeddings.dropout: expected True, found False"),
        (other_setting, "config: pad_token_id: expected 0, found 3"),
        (device_map, "device_map: expected 'none', found {'': 'cpu'}"),
    ],
)
def test_a_change_is_found(bert: BertForMaskedLM, change: Callable[[BertForMaskedLM], None], line: str) -> None:
    other = copy.deepcopy(bert)
    change(other)
    assert line in [text.replace('"', "") for text in differences(model_state(bert), model_state(other))]


def test_a_copy_of_a_model_does_not_differ(bert: BertForMaskedLM) -> None:
    assert differences(model_state(bert), model_state(copy.deepcopy(bert))) == []


def test_computed_tensors_that_stock_leaves_on_meta_are_mended_by_their_values(bert: BertForMaskedLM) -> None:
    stock, right, wrong = (copy.deepcopy(bert) for _ in range(3))
    left_on_meta(stock)
    other_weight_and_buffer(wrong)
    built, expected, found = model_state(bert), model_state(stock), model_state(right)
    assert mended(built, expected, found) == ["bert.embeddings.position_ids"]
    assert mended(built, found, model_state(wrong)) == []


def test_gaps_are_missing_reshaped_and_unknown_tensors(bert: BertForMaskedLM, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path / "whole")
    make_gaps(tmp_path / "whole", tmp_path / "gaps", bert.state_dict())
    _, info = BertForMaskedLM.from_pretrained(tmp_path / "gaps", output_loading_info=True, ignore_mismatched_sizes=True)
    assert len(info["missing_keys"]) > 3
    assert len(info["mismatched_keys"]) == 1
    assert info["unexpected_keys"] == {"of.nothing"}


def test_nan_is_equal_to_itself(bert: BertForMaskedLM) -> None:
    model = copy.deepcopy(bert)
    model.bert.embeddings.LayerNorm.bias.data[0] = torch.nan
    assert differences(model_state(model), model_state(copy.deepcopy(model))) == []


def test_what_transformers_logs_is_heard_without_the_folder(bert: BertForMaskedLM, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path)
    with listening(tmp_path) as heard:
        BertForMaskedLM.from_pretrained(tmp_path, num_hidden_layers=3)
    (told,) = heard
    assert "LOAD REPORT from: FOLDER" in told
    assert "MISSING" in told


class Altering(Stock):
    """Loads like transformers, then changes one parameter."""

    def load(self, model_class: type[PreTrainedModel], folder: Path, **options: Any) -> Any:
        model, info = super().load(model_class, folder, **options)
        next(model.parameters()).data.add_(1)
        return model, info


class Failing(Stock):
    """Ends its process at one class and hangs at another, as a bug in native code would."""

    def load(self, model_class: type[PreTrainedModel], folder: Path, **options: Any) -> Any:
        if model_class.__name__ == "BertForMaskedLM":
            os._exit(3)
        if model_class.__name__ == "BertForMultipleChoice":
            time.sleep(600)
        return super().load(model_class, folder, **options)


def test_a_loader_that_alters_a_model_is_seen_in_every_variant(tmp_path: Path) -> None:
    result = Case(REACHABLE["BertModel"], Altering(), tmp_path / "scratch").run()
    assert result.status == DIFFERS
    assert set(result.differences) == {
        "written by transformers",
        "in bfloat16",
        "with gaps",
        "saved, files",
        "saved",
        "saved as .bin, files",
        "saved as .bin",
    }


def test_stock_does_not_differ_from_itself_and_leaves_nothing(tmp_path: Path) -> None:
    result = Case(REACHABLE["BertModel"], Stock(), tmp_path / "scratch", other_first=True).run()
    assert (result.status, result.lossy) == (PASSED, [])
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_ends_or_hangs_its_process_costs_only_itself() -> None:
    names = ["BertForMaskedLM", "BertForMultipleChoice", "BertModel"]
    results = {r.class_name: r for r in run(chosen([], names, 0), Failing(), n_jobs=1, seconds_a_class=6)}
    assert {name: result.status for name, result in results.items()} == {
        "BertForMaskedLM": SKIPPED,
        "BertForMultipleChoice": SKIPPED,
        "BertModel": PASSED,
    }
    assert results["BertForMaskedLM"].reason == "the process ended with code 3"
    assert results["BertForMultipleChoice"].reason == "took longer than 6 s"


def test_the_command_prints_the_table_keeps_every_result_and_says_by_its_status_if_any_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "results.json"
    assert main(["--family", "bert", "--class", "BertModel", "--jobs", "1", "--json", str(kept)]) == 0
    (result,) = json.loads(kept.read_text())
    assert (result["class_name"], result["status"], result["differences"]) == ("BertModel", PASSED, {})
    assert "1 classes of 1 families" in capsys.readouterr().out


def test_a_class_that_its_family_does_not_have_is_skipped_with_the_reason(tmp_path: Path) -> None:
    result = Case(Reachable("bert", "BertForNothing"), Stock(), tmp_path).run()
    assert result.status == SKIPPED
    assert "BertForNothing" in result.reason


def test_a_tiny_model_is_tiny_and_has_every_kind_of_layer() -> None:
    model = build(REACHABLE["JambaForCausalLM"].model_class, SEED)
    assert sum(p.numel() for p in model.parameters()) < MOST_PARAMETERS
    assert {type(layer).__name__ for layer in model.model.layers} == {
        "JambaAttentionDecoderLayer",
        "JambaMambaDecoderLayer",
    }


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_class_that_needs_an_absent_package_says_which() -> None:
    with pytest.raises(NotBuiltError, match="timm"):
        build(REACHABLE["TimmBackbone"].model_class, SEED)


def test_the_report_names_what_differs_and_adds_up() -> None:
    differing: Mapping[str, list[str]] = {"saved": ["tensors: missing a.weight"]}
    text = report(
        [
            Result(
                "bert", "BertModel", DIFFERS, differences=dict(differing), fast=6, stock_seconds=2.0, other_seconds=1.0
            ),
            Result(
                "bert", "BertForMaskedLM", fast=5, handed_over={"a quantizer": 1}, stock_seconds=2.0, other_seconds=1.0
            ),
            Result("dinat", "DinatModel", SKIPPED, "needs natten"),
        ],
        seconds=9.0,
    )
    assert "bert.BertModel\n    saved:\n      tensors: missing a.weight" in text
    assert "DinatModel: needs natten" in text
    assert "3 classes of 2 families in 9 s: 1 passed, 1 differs, 0 stock fails, 1 skipped" in text
    assert "11 loads and saves by fastload, 1 handed over (8.3%)\n    1 x a quantizer" in text
    assert "loads took 4.00 s of the processor by stock and 2.00 s by the other (50.0%)" in text
