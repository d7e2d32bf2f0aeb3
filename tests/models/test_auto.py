"""Auto classes choose by the config, can be taught, and say what they do not know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from twins import SMALL, assert_same, tokens

from fastload.errors import ConfigError, OptionError
from fastload.models import auto, bert_heads, registry
from fastload.models.auto import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from fastload.models.base import PreTrainedModel
from fastload.models.bert import BertModel
from fastload.models.bert_config import BertConfig
from fastload.models.config import PreTrainedConfig

CHOICES = {
    "AutoModel": "BertModel",
    "AutoModelForCausalLM": "BertLMHeadModel",
    "AutoModelForMaskedLM": "BertForMaskedLM",
    "AutoModelForMultipleChoice": "BertForMultipleChoice",
    "AutoModelForNextSentencePrediction": "BertForNextSentencePrediction",
    "AutoModelForPreTraining": "BertForPreTraining",
    "AutoModelForQuestionAnswering": "BertForQuestionAnswering",
    "AutoModelForSequenceClassification": "BertForSequenceClassification",
    "AutoModelForTokenClassification": "BertForTokenClassification",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint written by transformers."""
    torch.manual_seed(0)
    transformers.BertForPreTraining(transformers.BertConfig(**SMALL, is_decoder=True)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))


def write_config(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


class OwnConfig(PreTrainedConfig):
    model_type = "own"
    width: int = 4


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, config.width)
        self.post_init()


class OtherModel(OwnModel):
    pass


# Choosing


def test_every_auto_class_is_listed() -> None:
    assert set(auto.__all__) == {"AutoConfig", *CHOICES}
    assert set(CHOICES.values()) == {"BertModel", *bert_heads.__all__}


@pytest.mark.parametrize(("name", "expected"), CHOICES.items())
def test_class_is_chosen_as_transformers_chooses_it(name: str, expected: str) -> None:
    model = getattr(auto, name).from_config(BertConfig(**SMALL, is_decoder=name == "AutoModelForCausalLM"))
    theirs = getattr(transformers, name)._model_mapping[transformers.BertConfig].__name__
    assert type(model).__name__ == theirs == expected


@pytest.mark.parametrize(("name", "expected"), CHOICES.items())
def test_checkpoint_is_loaded_into_the_class(name: str, expected: str, folder: Path) -> None:
    model = getattr(auto, name).from_pretrained(folder)
    assert type(model).__name__ == expected
    assert not model.training
    theirs = getattr(transformers, name).from_pretrained(folder)
    if name in ("AutoModelForPreTraining", "AutoModelForMaskedLM", "AutoModelForCausalLM"):
        assert_same(model(tokens(2, 6)), theirs(tokens(2, 6)))


def test_config_is_of_the_family(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert type(config) is BertConfig
    assert config.name_or_path == str(folder)
    ours, others = config.to_dict(), theirs.to_dict()
    assert ours == others


def test_architectures_decide_where_there_is_no_model_type(tmp_path: Path) -> None:
    write_config(tmp_path, architectures=["SomethingElse", "BertForTokenClassification"], vocab_size=9)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is BertConfig
    assert config.vocab_size == 9


def test_keywords_are_fields_options_or_errors(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5, dtype="bfloat16", is_decoder=False)
    assert model.classifier.out_features == 5
    assert model.dtype is torch.bfloat16
    assert model.config.is_decoder is False
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert model.config.attn_implementation == "eager"
    assert info["missing_keys"] == set()
    with pytest.raises(TypeError, match="num_label'"):
        AutoModel.from_pretrained(folder, num_label=5)
    with pytest.raises(TypeError, match="num_label'"):
        AutoConfig.from_pretrained(folder, num_label=5)
    config, unused = AutoConfig.from_pretrained(folder, num_label=5, vocab_size=9, return_unused_kwargs=True)
    assert (config.vocab_size, unused) == (9, {"num_label": 5})


def test_a_config_can_be_given(folder: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder, is_decoder=False)
    model = AutoModel.from_pretrained(folder, config=config)
    assert type(model) is BertModel
    assert model.config.is_decoder is False
    config.save_pretrained(tmp_path / "other")
    assert AutoModel.from_pretrained(folder, config=tmp_path / "other").config.is_decoder is False


def test_arguments_of_the_constructor_are_passed_on(folder: Path) -> None:
    assert AutoModel.from_pretrained(folder, False).pooler is None


def test_fresh_configs_and_models(families: None) -> None:
    assert AutoConfig.for_model("bert", vocab_size=7) == BertConfig(vocab_size=7)
    model = AutoModel.from_config(BertConfig(**SMALL), dtype="float16", attn_implementation="eager")
    assert model.dtype is torch.float16
    with pytest.raises(ConfigError, match="did you mean 'bert'"):
        AutoConfig.for_model("brt")


def test_auto_classes_are_not_built() -> None:
    for kind in (AutoConfig, AutoModel, AutoModelForMaskedLM):
        with pytest.raises(TypeError, match=f"{kind.__name__}.from_pretrained"):
            kind()


def test_no_model_is_imported_to_choose_a_config(folder: Path) -> None:
    code = (
        "import sys; from fastload.models.auto import AutoConfig; AutoConfig.from_pretrained(sys.argv[1]);"
        "print([name for name in ('torch', 'transformers', 'numpy', 'huggingface_hub') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# What is not known


@pytest.mark.parametrize("kind", [AutoConfig, AutoModel])
@pytest.mark.parametrize(
    ("values", "key", "shown"),
    [
        ({"model_type": "brt"}, "model_type", "did you mean 'bert'"),
        ({"model_type": "llaama", "architectures": ["BertModel"]}, "model_type", "'llaama'"),
        ({"model_type": 3}, "model_type", "3"),
        ({"model_type": ["bert"]}, "model_type", "['bert']"),
        ({}, "model_type", "nothing"),
        ({"architectures": []}, "model_type", "nothing"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures", "GPT2LMHeadModel"),
        ({"architectures": "BertModel"}, "architectures", "'BertModel'"),
        ({"architectures": [{}, 3]}, "architectures", "[{}, 3]"),
    ],
)
def test_unknown_family_is_an_error_with_file_and_families(
    kind: type[Any], values: dict[str, Any], key: str, shown: str, tmp_path: Path
) -> None:
    write_config(tmp_path, **values)
    with pytest.raises(ConfigError) as raised:
        kind.from_pretrained(tmp_path)
    assert raised.value.file == str(tmp_path / "config.json")
    assert raised.value.key == key
    assert "bert" in str(raised.value.expected)
    assert shown in str(raised.value)


def test_a_model_type_can_be_given_by_hand(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values["model_type"], values["architectures"]
    write_config(folder, **values)
    assert type(AutoConfig.from_pretrained(folder, model_type="bert")) is BertConfig
    assert type(AutoModel.from_pretrained(folder, model_type="bert")) is BertModel


# Registering


def test_own_classes_can_be_registered(families: None, tmp_path: Path) -> None:
    AutoConfig.register("own", OwnConfig)
    AutoModel.register(OwnConfig, OwnModel)
    model = AutoModel.from_config(OwnConfig(width=3))
    assert type(model) is OwnModel
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is OwnModel
    assert torch.equal(again.layer.weight, model.layer.weight)
    write_config(tmp_path, architectures=["OwnModel"], width=3)
    assert type(AutoConfig.from_pretrained(tmp_path)) is OwnConfig
    with pytest.raises(ConfigError, match="own has no model for AutoModelForMaskedLM"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_model_may_be_registered_before_its_config(families: None) -> None:
    AutoModelForMaskedLM.register(OwnConfig, OwnModel)
    AutoConfig.register("own", OwnConfig)
    assert type(AutoModelForMaskedLM.from_config(OwnConfig())) is OwnModel


def test_what_is_there_is_replaced_only_if_that_is_meant(families: None) -> None:
    AutoModel.register(OwnConfig, OwnModel)
    with pytest.raises(OptionError, match="registered already"):
        AutoModel.register(OwnConfig, OtherModel)
    AutoModel.register(OwnConfig, OtherModel, exist_ok=True)
    assert type(AutoModel.from_config(OwnConfig())) is OtherModel

    class NewBert(BertConfig):
        pass

    with pytest.raises(OptionError, match="config class"):
        AutoConfig.register("bert", NewBert)
    AutoConfig.register("bert", NewBert, exist_ok=True)
    assert type(AutoConfig.for_model("bert")) is NewBert
    assert type(AutoModel.from_config(NewBert(**SMALL))) is BertModel


def test_a_config_is_registered_under_its_own_name(families: None) -> None:
    with pytest.raises(ConfigError, match="another model type"):
        AutoConfig.register("different", OwnConfig)
    with pytest.raises(OptionError, match="needs a model_type"):
        AutoModel.register(PreTrainedConfig, OwnModel)
