"""Modules that hold their tensors in other ways than a linear layer does, loaded as by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastload import hf
from tests.hf.families import randomised
from tests.hf.sides import assert_same_load

N = 4


class UnusualConfig(PreTrainedConfig):
    model_type = "fastload-unusual"
    tie_word_embeddings: bool = True


class Remembering(nn.Module):
    """Saves something that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.seen = torch.zeros(3, device="cpu")

    def get_extra_state(self) -> torch.Tensor:
        return self.seen

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.seen = state


class Unusual(PreTrainedModel):
    config_class = UnusualConfig
    base_model_prefix = "unusual"
    _keep_in_fp32_modules = ["halves_in_float32"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["always_in_float32"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^old\."]  # noqa: RUF012
    _tied_weights_keys = {"head.weight": "embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(7, N, padding_idx=0)
        self.head = nn.Linear(N, 7, bias=False)
        self.once = self.twice = nn.Linear(N, N)
        self.halves_in_float32, self.always_in_float32 = nn.Linear(N, 2), nn.Linear(N, 3)
        self.several = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.ones(2))})
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.whole_numbers = nn.Parameter(torch.arange(3), requires_grad=False)
        self.of_own_type = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.scalar, self.empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0, 3))
        self.register_parameter("no_parameter", None)
        self.register_buffer("no_buffer", None)
        self.register_buffer("counts", torch.arange(N))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("halves", torch.ones(2, dtype=torch.float16))
        self.normalised = nn.utils.parametrizations.weight_norm(nn.Linear(N, N))
        self.batches, self.groups = nn.BatchNorm1d(N), nn.GroupNorm(2, N)
        self.recurrent, self.attention = nn.LSTM(N, N, num_layers=2), nn.MultiheadAttention(N, 2)
        self.convolution, self.layer = nn.Conv1d(N, N, 3), nn.TransformerEncoderLayer(N, 2, 8)
        self.remembering = Remembering()
        self.post_init()


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    model = randomised(Unusual(UnusualConfig()))
    model.remembering.seen = torch.arange(3.0)
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


Write = Callable[[dict[str, torch.Tensor]], Path]


@pytest.fixture(params=["safetensors", "bin"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    def save(state: dict[str, torch.Tensor]) -> Path:
        UnusualConfig().save_pretrained(tmp_path)
        if request.param == "bin":
            torch.save(state, tmp_path / "pytorch_model.bin")
        else:
            save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_tensor_is_where_transformers_puts_it(write: Write, state: dict[str, torch.Tensor], dtype: str) -> None:
    loaded = assert_same_load(Unusual, write(state), dtype=dtype)
    assert (loaded.info["missing_keys"], loaded.info["unexpected_keys"]) == ("[]", "[]")
    model: Any = loaded.model
    assert model.once is model.twice
    assert model.head.weight is model.embeddings.weight
    assert model.always_in_float32.weight.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(model.remembering.seen.float(), torch.arange(3.0))


def test_recurrent_modules_compute_with_what_was_loaded(write: Write, state: dict[str, torch.Tensor]) -> None:
    x = torch.ones(5, 2, N)
    with hf.enabled():
        model = Unusual.from_pretrained(write(state))
    expected = nn.LSTM(N, N, num_layers=2)
    expected.load_state_dict({key: state[f"recurrent.{key}"] for key in expected.state_dict()})
    assert torch.equal(model.recurrent(x)[0], expected(x)[0])


def test_keys_of_what_the_model_has_no_tensor_for(write: Write, state: dict[str, torch.Tensor]) -> None:
    more = dict.fromkeys(["no_parameter", "no_buffer", "old.weight", "new.weight", "frozen.more"], torch.ones(2))
    loaded = assert_same_load(Unusual, write({**state, **{key: tensor.clone() for key, tensor in more.items()}}))
    assert loaded.info["unexpected_keys"] == repr(sorted(map(repr, set(more) - {"old.weight"})))


def test_a_state_dict_of_the_models_own_making(write: Write, state: dict[str, torch.Tensor]) -> None:
    class Selective(Unusual):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {key: tensor for key, tensor in super().state_dict(*args, **kwargs).items() if "layer" not in key}

    loaded = assert_same_load(Selective, write({key: state[key] for key in state if "layer" not in key}))
    assert loaded.info["missing_keys"] == "[]"


def test_what_is_written_again_is_what_was_read(write: Write, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with hf.enabled():
        model = Unusual.from_pretrained(write(state))
    again = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file(again, tmp_path / "again.safetensors")
    found = load_file(tmp_path / "again.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.items())
