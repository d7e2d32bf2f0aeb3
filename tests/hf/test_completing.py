"""Models whose authors did not know that they would be built on meta: whole with fastload, not with transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, dynamic_module_utils

from fastload import hf
from fastload.errors import IncompleteModelError
from tests.hf.families import randomised
from tests.hf.sides import assert_same_models

N = 64
CODE = f"""
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

N = {N}


class Rotation(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", 1.0 / 10 ** (torch.arange(N) / N), persistent=False)
        self.steps = torch.arange(N) * 3


class TableConfig(PreTrainedConfig):
    model_type = "fastload-table"


class TableModel(PreTrainedModel):
    config_class = TableConfig
    base_model_prefix = "table"

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(N, N)
        self.rotation = Rotation()
        self.register_buffer("scale", torch.linspace(-3, 5, N), persistent=False)
        self.register_buffer("counts", torch.arange(N), persistent=False)
        self.register_buffer("kept", torch.ones(N))
        self.offsets = torch.arange(N, dtype=torch.float32).flip(0)
        self.post_init()

    def forward(self, x):
        return self.layer(x) * self.scale + self.offsets * self.rotation.frequencies + self.rotation.steps + self.counts
"""


@pytest.fixture(autouse=True)
def _memory_without_values_is_nan() -> Iterator[None]:
    """torch fills what nobody has written, so that it cannot be right by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a modelling file of its own, which computes tensors in its constructors."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    made = tmp_path / "table"
    model = built()
    model.config.auto_map = {"AutoConfig": "modeling_table.TableConfig", "AutoModel": "modeling_table.TableModel"}
    model.save_pretrained(made)
    (made / "modeling_table.py").write_text(CODE)
    return made


def built() -> Any:
    """The model as its constructor makes it, with random weights."""
    names: dict[str, Any] = {"__name__": "tests.hf.modeling_table"}
    exec(CODE, names)
    return randomised(names["TableModel"](names["TableConfig"]()))


def computed(model: Any) -> dict[str, torch.Tensor]:
    rotation = model.rotation
    return {
        "frequencies": rotation.frequencies,
        "scale": model.scale,
        "counts": model.counts,
        "steps": rotation.steps,
        "offsets": model.offsets,
    }


def wrong(model: Any) -> set[str]:
    """What of the model is not what its constructor computes."""
    expected = computed(built())
    return {
        name for name, tensor in computed(model).items() if tensor.is_meta or not torch.equal(tensor, expected[name])
    }


def test_transformers_alone_leaves_them_without_values(folder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert wrong(model) == set(computed(model))
    assert model.rotation.frequencies.isnan().all()
    assert model.offsets.is_meta
    with pytest.raises(RuntimeError):
        model(torch.ones(N))


def test_buffers_and_attributes_have_the_values_of_their_constructor(folder: Path) -> None:
    hf.reset_stats()
    model = hf.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert hf.stats() == hf.Stats(fast_loads=1)
    assert wrong(model) == set()
    assert torch.equal(model(torch.ones(N)), built()(torch.ones(N)))
    with hf.enabled():
        assert wrong(transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)) == set()


def test_they_are_of_the_type_that_the_model_is_built_in(folder: Path) -> None:
    with default_dtype(torch.bfloat16):
        expected = computed(built())
    model = hf.AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="bfloat16")
    found = computed(model)
    assert model.layer.weight.dtype == torch.bfloat16
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_building_again_draws_no_random_numbers(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    hf.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


def test_two_models_share_nothing_that_was_computed(folder: Path) -> None:
    first, second = (hf.AutoModel.from_pretrained(folder, trust_remote_code=True) for _ in range(2))
    for tensor in computed(first).values():
        tensor.zero_()
    assert wrong(second) == set()


def test_a_parameter_that_is_in_no_file_and_that_nobody_initialises(folder: Path) -> None:
    class Gated(type(built())):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.gate = nn.Parameter(torch.full((N,), 0.25))

    assert Gated.from_pretrained(folder).gate.isnan().all()
    with hf.enabled():
        model, info = Gated.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"gate"}
    assert torch.equal(model.gate, torch.full((N,), 0.25))
    assert model.gate.requires_grad


def test_attributes_that_hold_tensors_in_containers(folder: Path) -> None:
    class Listed(type(built())):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.tables = [torch.arange(4), {"inner": torch.arange(5)}, (torch.arange(6), "text")]

    assert Listed.from_pretrained(folder).tables[0].is_meta
    with hf.enabled():
        tables = Listed.from_pretrained(folder).tables
    assert torch.equal(tables[0], torch.arange(4))
    assert torch.equal(tables[1]["inner"], torch.arange(5))
    assert torch.equal(tables[2][0], torch.arange(6))


def test_a_buffer_that_is_saved_and_missing(folder: Path) -> None:
    # `kept` is stored by this class; a checkpoint of an earlier version may lack it.
    weights = load_file(folder / "model.safetensors")
    del weights["kept"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model, info = hf.AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert info["missing_keys"] == {"kept"}
    assert torch.equal(model.kept, torch.ones(N))


class MetaConfig(PreTrainedConfig):
    model_type = "fastload-meta"


class MetaModel(PreTrainedModel):
    """Computes a tensor on meta, whatever it is built on."""

    config_class = MetaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = nn.Linear(4, 4)
        self.shape_of_old = torch.empty(3, device="meta")
        self.post_init()


def test_what_has_no_values_even_when_built_for_real_is_an_error(tmp_path: Path) -> None:
    MetaModel(MetaConfig()).save_pretrained(tmp_path)
    assert MetaModel.from_pretrained(tmp_path).shape_of_old.is_meta
    with hf.enabled(), pytest.raises(IncompleteModelError, match="shape_of_old"):
        MetaModel.from_pretrained(tmp_path)


def test_models_that_know_meta_are_not_built_twice(tmp_path: Path) -> None:
    built_models: list[int] = []

    class Counted(transformers.LlamaModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            built_models.append(1)

    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    randomised(Counted(config)).save_pretrained(tmp_path)
    expected = Counted.from_pretrained(tmp_path)
    built_models.clear()
    with hf.enabled():
        assert_same_models(expected, Counted.from_pretrained(tmp_path))
    assert len(built_models) == 1


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
