"""Cold files are read while Python still imports the code of the model that they are for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import dynamic_module_utils

from fastload import hf
from tests.cold import make_cold, resident, wait_for_no_threads
from tests.hf.sides import assert_same_models

# A modelling file that looks, when it is imported, whether somebody reads the weights.
CODE = """
import time
from pathlib import Path
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from tests.cold import resident

WEIGHTS = Path({weights!r})
N_RESIDENT = 0
end = time.monotonic() + {patience_s}
while WEIGHTS.exists() and not N_RESIDENT > 1_000_000 and time.monotonic() < end:
    N_RESIDENT = resident(WEIGHTS)
    time.sleep(0.005)


class LookingConfig(PreTrainedConfig):
    model_type = "fastload-looking"


class LookingModel(PreTrainedModel):
    config_class = LookingConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(1024, 1024) for _ in range(4)])
        self.n_resident_at_import = N_RESIDENT
        self.post_init()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """16 MB that nobody has read, with a modelling file."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    made = tmp_path / "looking"
    code = CODE.format(weights=str(made / "model.safetensors"), patience_s=0.4)
    names: dict[str, Any] = {"__name__": "tests.hf.modeling_looking"}
    exec(code, names)
    model = names["LookingModel"](names["LookingConfig"]())
    model.config.auto_map = {
        "AutoConfig": "modeling_looking.LookingConfig",
        "AutoModel": "modeling_looking.LookingModel",
    }
    model.save_pretrained(made)
    (made / "modeling_looking.py").write_text(code)
    make_cold(made / "model.safetensors")
    yield made
    wait_for_no_threads()


def through_the_switch(*args: Any, **kwargs: Any) -> Any:
    with hf.enabled():
        return transformers.AutoModel.from_pretrained(*args, **kwargs)


def test_transformers_alone_imports_first(folder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert model.n_resident_at_import < 1_000_000


def test_an_auto_class_reads_before_it_imports(folder: Path) -> None:
    model = hf.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert model.n_resident_at_import > 1_000_000
    # The load has returned; what it began goes on to its end.
    wait_for_no_threads()
    assert resident(folder / "model.safetensors") > 16_000_000


@pytest.mark.parametrize("load", [hf.AutoModel.from_pretrained, through_the_switch], ids=["auto class", "switch"])
def test_what_was_read_ahead_is_what_is_loaded(folder: Path, load: Callable[..., Any]) -> None:
    model = load(folder, trust_remote_code=True)
    wait_for_no_threads()
    expected = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.n_resident_at_import = expected.n_resident_at_import
    assert_same_models(expected, model)
