"""generation_config.json: transformers' names, defaults and files, and whatever else is in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import fastload
from fastload import GenerationConfig
from fastload.errors import ConfigError
from fastload.models.config import PreTrainedConfig
from fastload.models.generation.generation_config import ACTED_ON, NOT_BUILT_IN, WITHOUT_EFFECT

TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def values_of(text: str) -> dict[str, object]:
    values: dict[str, object] = json.loads(text)
    values.pop("transformers_version", None)
    return values


def test_the_fields_are_those_of_transformers() -> None:
    theirs = {name for name in transformers.GenerationConfig().to_dict() if not name.startswith(("_", "transformers"))}
    assert theirs == {*ACTED_ON, *NOT_BUILT_IN, *WITHOUT_EFFECT}
    assert set(GenerationConfig().to_dict()) == theirs | {"_from_model_config", "transformers_version"}
    assert set(GenerationConfig().to_dict().values()) == {None}


def test_a_file_of_transformers_is_read_and_written_as_transformers_does(tmp_path: Path) -> None:
    theirs = transformers.GenerationConfig(
        do_sample=True, top_k=7, temperature=0.5, eos_token_id=[1, 2], pad_token_id=0
    )
    theirs.save_pretrained(tmp_path)
    ours = GenerationConfig.from_pretrained(tmp_path)
    assert (ours.do_sample, ours.top_k, ours.eos_token_id, ours.top_p) == (True, 7, [1, 2], None)
    assert ours.to_json_string() == (tmp_path / "generation_config.json").read_text()
    ours.save_pretrained(tmp_path / "again")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "again") == theirs


def test_fields_that_nobody_knows_are_kept() -> None:
    config = GenerationConfig.from_dict({"top_k": 3, "chat_format": "chatml", "nested": {"a": [1]}})
    assert config.chat_format == "chatml"
    assert values_of(config.to_json_string()) == {"top_k": 3, "chat_format": "chatml", "nested": {"a": [1]}}
    assert config.update(top_k=4, chat_format="raw", topk=1) == {"topk": 1}
    assert (config.top_k, config.chat_format) == (4, "raw")


def test_an_old_config_json_says_it_too() -> None:
    fields = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 99, "use_cache": False, "unheard_of": 1}
    ours = GenerationConfig.from_model_config(PreTrainedConfig(**fields))
    assert (ours.bos_token_id, ours.eos_token_id, ours.max_length, ours.use_cache) == (1, 2, 99, False)
    assert not ours.has_field("unheard_of")
    assert ours.to_diff_dict()["_from_model_config"] is True


def test_configs_are_equal_that_say_the_same() -> None:
    assert GenerationConfig(top_k=1) == GenerationConfig(top_k=1, transformers_version="5.0", top_p=None)
    assert GenerationConfig(top_k=1) != GenerationConfig(top_k=2)
    assert repr(GenerationConfig(top_k=1, _from_model_config=True)) == "GenerationConfig(top_k=1)"


def test_a_copy_shares_nothing() -> None:
    config = GenerationConfig(eos_token_id=[1])
    config.to_dict()["eos_token_id"].append(2)
    assert config.eos_token_id == [1]


@pytest.mark.parametrize(("text", "problem"), [("{", "not JSON"), ("[]", "no object"), ('{"update": 1}', "reserved")])
def test_a_file_that_is_none_is_an_error(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        GenerationConfig.from_pretrained(tmp_path)


def test_no_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other\.json"):
        GenerationConfig.from_pretrained(tmp_path, "other.json")


def test_a_misspelt_field_is_an_error(tmp_path: Path) -> None:
    GenerationConfig(top_k=3).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path, top_k=5).top_k == 5
    with pytest.raises(TypeError, match="topk"):
        GenerationConfig.from_pretrained(tmp_path, topk=5)


def test_it_needs_no_torch() -> None:
    code = "import fastload, sys; fastload.GenerationConfig(top_k=1); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert fastload.GenerationConfig is GenerationConfig
