"""fastload.hf's Auto classes: all that transformers has, thin, and transformers itself is left as it is."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, dynamic_module_utils
from transformers.models.auto.auto_factory import _BaseAutoModelClass

import fastload
from fastload import hf
from fastload.errors import OptionError
from tests.hf.families import FAMILIES, randomised
from tests.hf.sides import assert_same_models
from tests.sources.hub_server import HubServer

Written = Callable[..., Path]

AUTO_OF = {
    "bert": "AutoModelForMaskedLM",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "qwen3_moe": "AutoModelForCausalLM",
    "mixtral": "AutoModelForCausalLM",
    "deepseek_v3": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
    "clip": "AutoModelForZeroShotImageClassification",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "llava": "AutoModelForImageTextToText",
}


def auto_classes() -> list[str]:
    """What transformers itself exports."""
    exported = {name: getattr(transformers, name) for name in dir(transformers) if name.startswith("Auto")}
    return [
        name for name, value in exported.items() if isinstance(value, type) and issubclass(value, _BaseAutoModelClass)
    ]


def test_importing_fastload_hf_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, fastload.hf; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_auto_class_of_transformers_is_there() -> None:
    assert len(auto_classes()) > 35
    assert set(auto_classes()) <= set(dir(hf))
    for name in auto_classes():
        ours, theirs = getattr(hf, name), getattr(transformers, name)
        assert ours is getattr(hf, name)
        assert ours is not theirs
        assert issubclass(ours, theirs)
        assert (ours.__name__, ours.__module__, ours.__doc__) == (name, "fastload.hf", theirs.__doc__)
        added = set(vars(ours)) - {"__module__", "__qualname__", "__doc__", "__static_attributes__", "__firstlineno__"}
        assert added == {"from_pretrained", "_model_mapping"}


def test_names_that_transformers_does_not_have_are_attribute_errors() -> None:
    for name in ("AutoModelForNothing", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(hf, name)
    assert set(hf.__all__) <= set(dir(hf))


def test_what_is_no_auto_class_of_models_is_transformers_own() -> None:
    assert hf.AutoConfig is transformers.AutoConfig
    assert hf.AutoTokenizer is transformers.AutoTokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_of_transformers_class_and_like_its_own(written: Written, family: str) -> None:
    name = AUTO_OF[family]
    expected = getattr(transformers, name).from_pretrained(written(family))
    hf.reset_stats()
    found = getattr(hf, name).from_pretrained(written(family))
    assert hf.stats() == hf.Stats(fast_loads=1)
    assert type(found) is type(expected) is getattr(transformers, FAMILIES[family][0])
    assert_same_models(expected, found)


def test_options_go_the_same_way(written: Written) -> None:
    options: dict[str, Any] = {"dtype": "bfloat16", "num_labels": 5, "ignore_mismatched_sizes": True}
    torch.manual_seed(3)
    expected = transformers.AutoModelForImageClassification.from_pretrained(written("vit"), **options)
    torch.manual_seed(3)
    found, info = hf.AutoModelForImageClassification.from_pretrained(
        written("vit"), **options, output_loading_info=True
    )
    assert_same_models(expected, found)
    assert {name for name, _, _ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}


def test_an_unknown_config_is_refused_in_transformers_words(written: Written) -> None:
    for autos in (transformers, hf):
        with pytest.raises(ValueError, match=r"Unrecognized configuration class .*LlamaConfig.* AutoModelForCTC"):
            autos.AutoModelForCTC.from_pretrained(written("llama"))


def test_a_model_from_a_config() -> None:
    config = FAMILIES["llama"][1]()
    torch.manual_seed(0)
    expected = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    assert_same_models(expected, hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def test_a_backbone_of_a_hub(hub: HubServer, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = transformers.ResNetConfig(**sizes, layer_type="basic", out_features=["stage2"])
    randomised(transformers.ResNetBackbone(config)).save_pretrained(tmp_path / "written")
    hub.push("org/backbone", tmp_path / "written")
    cache = tmp_path / "cache"
    expected = transformers.AutoBackbone.from_pretrained("org/backbone", cache_dir=cache)
    found = hf.AutoBackbone.from_pretrained("org/backbone", cache_dir=cache)
    assert fastload.report(found).n_tensors == len(found.state_dict())
    assert_same_models(expected, found)


class TinyConfig(PreTrainedConfig):
    model_type = "fastload-tiny"
    width: int = 8


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "tiny"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, config.width)
        self.post_init()


@pytest.fixture
def registered() -> Iterator[None]:
    """The tiny family, known to transformers' Auto classes through fastload's."""
    AutoConfig.register("fastload-tiny", TinyConfig)
    hf.AutoModel.register(TinyConfig, TinyModel)
    yield
    transformers.CONFIG_MAPPING._extra_content.pop("fastload-tiny")
    transformers.AutoModel._model_mapping._extra_content.pop(TinyConfig)


@pytest.mark.usefixtures("registered")
def test_a_family_that_is_registered_is_loaded_by_both(tmp_path: Path) -> None:
    randomised(TinyModel(TinyConfig(width=4))).save_pretrained(tmp_path)
    expected = transformers.AutoModel.from_pretrained(tmp_path)
    hf.reset_stats()
    found = hf.AutoModel.from_pretrained(tmp_path)
    assert hf.stats().fast_loads == 1
    assert type(found) is TinyModel
    assert_same_models(expected, found)


REMOTE_CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel


class RemoteConfig(PreTrainedConfig):
    model_type = "remote-tiny"
    width: int = 8


class RemoteModel(PreTrainedModel):
    config_class = RemoteConfig
    base_model_prefix = "remote"

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, config.width)
        self.post_init()

    def forward(self, x):
        return self.layer(x)
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a modelling file of its own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "modeling_remote.py").write_text(REMOTE_CODE)
    names: dict[str, Any] = {}
    exec(REMOTE_CODE, names)
    model = randomised(names["RemoteModel"](names["RemoteConfig"](width=4)))
    model.config.auto_map = {
        "AutoConfig": "modeling_remote.RemoteConfig",
        "AutoModel": "modeling_remote.RemoteModel",
    }
    model.save_pretrained(folder)
    return folder


def test_a_checkpoint_with_its_own_modelling_file(remote: Path) -> None:
    expected = transformers.AutoModel.from_pretrained(remote, trust_remote_code=True)
    hf.reset_stats()
    found = hf.AutoModel.from_pretrained(remote, trust_remote_code=True)
    with hf.enabled():
        through_switch = transformers.AutoModel.from_pretrained(remote, trust_remote_code=True)
    assert hf.stats() == hf.Stats(fast_loads=2)
    assert type(found) is type(expected) is type(through_switch)
    assert_same_models(expected, found)
    assert_same_models(expected, through_switch)
    x = torch.ones(2, 4)
    assert torch.equal(found(x), expected(x))


def test_a_modelling_file_that_is_not_trusted_is_refused(remote: Path) -> None:
    for autos in (transformers, hf):
        with pytest.raises(ValueError, match="trust_remote_code"):
            autos.AutoModel.from_pretrained(remote, trust_remote_code=False)


def test_transformers_is_left_as_it_is_while_a_model_is_loaded(written: Written) -> None:
    # Seen from another thread, at any moment of the loads.
    before = dict(vars(PreTrainedModel))
    changed: set[str] = set()
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.is_set():
            now = dict(vars(PreTrainedModel))
            changed.update(name for name in {*before, *now} if now.get(name) is not before.get(name))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for family in ("bert", "llama", "qwen3_moe"):
            getattr(hf, AUTO_OF[family]).from_pretrained(written(family))
    finally:
        is_done.set()
        watcher.join()
    # transformers itself swaps this one, for as long as it builds a model.
    assert changed <= {"tie_weights"}


def test_loads_of_transformers_own_classes_are_not_touched(written: Written) -> None:
    hf.AutoModelForCausalLM.from_pretrained(written("llama"))
    hf.reset_stats()
    for model_class in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        model = model_class.from_pretrained(written("llama"))
        with pytest.raises(OptionError, match="not loaded by fastload"):
            fastload.report(model)
    assert hf.stats() == hf.Stats()


def test_fastloads_own_auto_class_gives_transformers_model_where_it_has_none(written: Written) -> None:
    found = fastload.AutoModelForCausalLM.from_pretrained(written("gpt2"))
    assert_same_models(transformers.AutoModelForCausalLM.from_pretrained(written("gpt2")), found)
