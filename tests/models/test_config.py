"""Configs: equal to transformers' side by side, whole through files, and clear about what is wrong."""

from __future__ import annotations

import copy
import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastload.errors import ConfigError, SaveError
from fastload.models.bert_config import BertConfig
from fastload.models.config import PreTrainedConfig, PretrainedConfig

# Configs as they are found on the hub: written by versions 2 to 5 of transformers and by others.
REAL = {
    "bert-base-uncased": {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": 30522,
    },
    "all-MiniLM-L6-v2": {
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "layer_norm_eps": 1e-12,
        "model_type": "bert",
        "num_hidden_layers": 6,
        "transformers_version": "4.8.2",
    },
    "a classifier": {
        "architectures": ["BertForSequenceClassification"],
        "classifier_dropout": None,
        "finetuning_task": "mnli",
        "id2label": {"0": "contradiction", "1": "entailment", "2": "neutral"},
        "label2id": {"contradiction": 0, "entailment": 1, "neutral": 2},
        "model_type": "bert",
        "problem_type": "single_label_classification",
        "torch_dtype": "float32",
        "transformers_version": "4.46.3",
    },
    "a decoder": {
        "add_cross_attention": True,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": [2, 3],
        "is_decoder": True,
        "model_type": "bert",
        "tie_word_embeddings": False,
        "output_hidden_states": True,
        "return_dict": False,
    },
    "the first ones": {"hidden_dropout_prob": 0, "vocab_size": 28996, "type_vocab_size": 2, "directionality": "bidi"},
    "with objects": {"model_type": "bert", "task": {"depth": [1, [2, None]], "dtype": "x"}, "scale": float("inf")},
}
FIELDS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "num_labels": {"num_labels": 5},
    "two labels": {"num_labels": 2},
    "one label": {"num_labels": 1, "problem_type": "regression"},
    "labels without a way back": {"id2label": {0: "A", 1: "B"}},
    "labels that do not fit": {"id2label": {0: "A", 1: "B"}, "label2id": {"A": 0, "B": 1}, "num_labels": 3},
    "dtype": {"dtype": torch.float16},
    "both spellings of dtype": {"dtype": "float16", "torch_dtype": "float32"},
    "outputs": {"output_hidden_states": True, "output_attentions": True, "attn_implementation": "eager"},
    "no attribute of the file": {"name_or_path": "somewhere", "chunk_size_feed_forward": 8},
    "unknown fields": {"adapters": {"a": [1, 2]}, "nothing": None, "share": 0.25, "words": ("x", "y")},
}


def without_version(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "transformers_version"}


def shown_without_version(config: Any) -> list[str]:
    return [line for line in repr(config).splitlines() if "transformers_version" not in line]


def write(folder: Path, text: str | dict[str, Any]) -> Path:
    (folder / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


@pytest.mark.parametrize("fields", [*FIELDS.values(), *REAL.values()], ids=[*FIELDS, *REAL])
def test_is_what_transformers_makes_of_the_same_fields(fields: dict[str, Any]) -> None:
    ours, theirs = BertConfig(**copy.deepcopy(fields)), transformers.BertConfig(**copy.deepcopy(fields))
    assert without_version(ours.to_dict()) == without_version(theirs.to_dict())
    assert without_version(ours.to_diff_dict()) == without_version(theirs.to_diff_dict())
    assert shown_without_version(ours) == shown_without_version(theirs)
    for name in theirs.to_dict():
        if name != "transformers_version":
            assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.num_labels, ours.dtype) == (theirs.num_labels, theirs.dtype)


def test_base_config_is_what_transformers_makes_it() -> None:
    assert without_version(PreTrainedConfig().to_dict()) == without_version(transformers.PreTrainedConfig().to_dict())
    assert PretrainedConfig is PreTrainedConfig


@pytest.mark.parametrize("fields", REAL.values(), ids=REAL)
def test_file_is_what_transformers_writes(fields: dict[str, Any], tmp_path: Path) -> None:
    BertConfig(**fields).save_pretrained(tmp_path / "ours")
    transformers.BertConfig(**copy.deepcopy(fields)).save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / name / "config.json").read_text() for name in ("ours", "theirs"))
    assert ours.endswith("}\n")
    lines = [[line for line in text.splitlines() if "transformers_version" not in line] for text in (ours, theirs)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("fields", REAL.values(), ids=REAL)
def test_transformers_reads_what_is_written_and_the_other_way_round(fields: dict[str, Any], tmp_path: Path) -> None:
    BertConfig(**fields).save_pretrained(tmp_path)
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BertConfig.from_pretrained(tmp_path / "theirs")
    assert without_version(ours.to_dict()) == without_version(theirs.to_dict())


def test_version_of_transformers_is_kept_and_never_made_up(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "bert", "transformers_version": "4.8.2"})
    assert BertConfig.from_pretrained(tmp_path).to_diff_dict()["transformers_version"] == "4.8.2"
    assert "transformers_version" not in repr(BertConfig())


def test_unknown_fields_are_attributes_and_are_written_back(tmp_path: Path) -> None:
    # transformers drops those that are settings of generation, such as max_length; here nothing is lost.
    fields = {"model_type": "bert", "my_field": {"a": 1}, "max_length": 20, "nothing": None}
    config = BertConfig.from_pretrained(write(tmp_path, fields))
    assert config.my_field == {"a": 1}
    config.another = 3
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {**fields, "another": 3}.items() <= saved.items()


def test_reading_writing_and_reading_again_changes_nothing(tmp_path: Path) -> None:
    config = BertConfig(num_labels=3, dtype="bfloat16", a_field=[float("nan")], transformers_version="4.1.0")
    config.save_pretrained(tmp_path)
    first = (tmp_path / "config.json").read_bytes()
    BertConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == first


def test_overrides_win_and_misspelt_ones_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "bert", "torch_dtype": "float16", "own": 1})
    config = BertConfig.from_pretrained(tmp_path, hidden_size=24, own=2, dtype="bfloat16", num_labels=4)
    assert (config.hidden_size, config.own, config.dtype, config.num_labels) == (24, 2, torch.bfloat16, 4)
    assert BertConfig.from_pretrained(tmp_path, dtype="auto").dtype is torch.float16
    with pytest.raises(TypeError, match="'hiden_size'"):
        BertConfig.from_pretrained(tmp_path, hiden_size=24)
    config, unused = BertConfig.from_pretrained(tmp_path, hiden_size=24, vocab_size=9, return_unused_kwargs=True)
    assert unused == {"hiden_size": 24}
    assert config.vocab_size == 9


def test_methods_are_no_fields_to_override(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="to_dict"):
        BertConfig.from_pretrained(write(tmp_path, {}), to_dict=1)


def test_from_dict_leaves_its_argument_alone() -> None:
    fields = {"hidden_size": 24, "model_type": "bert", "id2label": {"0": "A"}}
    before = copy.deepcopy(fields)
    assert BertConfig.from_dict(fields, hidden_size=36).hidden_size == 36
    assert fields == before


def test_a_config_is_read_from_a_folder_a_subfolder_or_a_file(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    BertConfig(vocab_size=7).save_pretrained(inner)
    for config in (
        BertConfig.from_pretrained(inner),
        BertConfig.from_pretrained(str(inner)),
        BertConfig.from_pretrained(tmp_path, subfolder="inner"),
        BertConfig.from_pretrained(inner / "config.json"),
        BertConfig.from_json_file(inner / "config.json"),
    ):
        assert config.vocab_size == 7


def test_equal_configs_are_equal_and_copies_are_independent() -> None:
    config = BertConfig(num_labels=3, words=["a"])
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), BertConfig(num_labels=3, words=["a"])):
        assert twin == config
        twin.words.append("b")
        assert twin != config
    assert config.words == ["a"]
    assert config != PreTrainedConfig()


def test_fields_have_other_names_where_the_class_says_so() -> None:
    class Renamed(PreTrainedConfig):
        model_type = "renamed"
        attribute_map = {"hidden_size": "n_embd"}  # noqa: RUF012
        n_embd: int = 8

    config = Renamed(hidden_size=16)
    assert (config.n_embd, config.hidden_size) == (16, 16)
    config.hidden_size = 32
    assert config.to_diff_dict() == {"model_type": "renamed", "n_embd": 32}
    with pytest.raises(AttributeError, match="no field 'n_embed'"):
        _ = config.n_embed


def test_importing_a_config_does_not_import_torch() -> None:
    code = (
        "import sys; from fastload.models.auto import AutoConfig; AutoConfig.for_model('bert');"
        "print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


# What is refused


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", "abc", "int"),
        ("hidden_size", 768.0, "int"),
        ("hidden_size", True, "int"),
        ("hidden_size", None, "int"),
        ("hidden_size", -768, "1 to"),
        ("hidden_size", 770, "a multiple of num_attention_heads = 12"),
        ("num_attention_heads", 0, "1 to"),
        ("num_hidden_layers", 10**12, "0 to"),
        ("max_position_embeddings", 10**15, "1 to"),
        ("vocab_size", [1], "int"),
        ("hidden_dropout_prob", "0.1", "float"),
        ("hidden_dropout_prob", 1.5, "0 to 1"),
        ("hidden_act", 3, "str"),
        ("use_cache", 1, "bool"),
        ("architectures", "BertModel", "list[str] | None"),
        ("pad_token_id", 30522, "less than vocab_size"),
        ("dtype", "float33", "one of"),
        ("id2label", ["a"], "an object"),
        ("id2label", {"zero": "a"}, "an object"),
        ("num_labels", -1, "0 to"),
        ("num_labels", 10**12, "0 to"),
        ("problem_type", "regresion", "regression"),
        ("add_cross_attention", True, "is_decoder = true"),
        ("to_dict", 1, None),
        ("__class__", 1, None),
        ("bounds", {}, None),
    ],
)
def test_value_that_cannot_be_is_refused_with_file_and_key(
    field: str, value: Any, expected: str | None, tmp_path: Path
) -> None:
    write(tmp_path, {"model_type": "bert", field: value})
    with pytest.raises(ConfigError) as raised:
        BertConfig.from_pretrained(tmp_path)
    assert raised.value.file == str(tmp_path / "config.json")
    assert raised.value.key == field
    assert expected is None or expected in str(raised.value.expected)
    assert len(str(raised.value)) < 1000


def test_fields_are_checked_where_they_are_given() -> None:
    with pytest.raises(ConfigError, match="wrong type"):
        BertConfig(hidden_size="abc")
    with pytest.raises(ConfigError, match="is none"):
        BertConfig(num_labels=1, problem_type="single_label_classification")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2",
        "version https://git-lfs.github.com/spec/v1",
        "<html>",
        "[" * 100_000,
        '{"a": ' + "1" * 5000 + "}",
    ],
    ids=["empty", "cut", "cut list", "lfs pointer", "html", "nested", "long number"],
)
def test_file_that_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not JSON") as raised:
        BertConfig.from_pretrained(write(tmp_path, text))
    assert raised.value.file == str(tmp_path / "config.json")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff\xfe\xfa"}')
    with pytest.raises(ConfigError, match="not JSON"):
        BertConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"bert"'])
def test_json_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no object"):
        BertConfig.from_pretrained(write(tmp_path, text))


def test_file_too_large_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="too large"):
        BertConfig.from_pretrained(tmp_path)


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        BertConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="there is no config"):
        BertConfig.from_json_file(tmp_path / "config.json")


def test_config_of_another_family_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "roberta", "vocab_size": 9})
    with pytest.raises(ConfigError, match="roberta"):
        BertConfig.from_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path, model_type="bert")
    assert (config.vocab_size, config.model_type) == (9, "bert")


# Saving


def test_file_gets_the_mode_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        BertConfig().save_pretrained(tmp_path / "new" / "folder")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new" / "folder" / "config.json").stat().st_mode) == 0o640


def test_saving_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SaveError):
        BertConfig().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_config_that_cannot_be_is_not_saved(tmp_path: Path) -> None:
    BertConfig(vocab_size=5).save_pretrained(tmp_path)
    config = BertConfig()
    config.hidden_size = 5
    with pytest.raises(ConfigError):
        config.save_pretrained(tmp_path)
    assert BertConfig.from_pretrained(tmp_path).vocab_size == 5
