"""Small real models, written by transformers once for all tests, and a guard of what no load may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, initialization, modeling_utils

from tests.hf.families import build
from tests.sources.conftest import server as server
from tests.sources.hub_server import HubServer

pytest.register_assert_rewrite("tests.hf.sides")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a family's small model, as transformers writes it; to be read only."""
    folders: dict[tuple[Any, ...], Path] = {}

    def write(family: str, class_name: str | None = None, **options: Any) -> Path:
        which = (family, class_name, *sorted(options.items()))
        if which not in folders:
            folders[which] = tmp_path_factory.mktemp(family)
            build(family, class_name).save_pretrained(folders[which], **options)
        return folders[which]

    return write


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A hub that transformers talks to as well; its client reads the address when it is imported."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    # The client behind the module's functions keeps the address that was the hub's when it was made.
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    return server


@pytest.fixture(autouse=True)
def _nothing_global_is_changed() -> Iterator[None]:
    before = global_state()
    yield
    after = global_state()
    assert [name for name in before if after[name] is not before[name]] == []


def global_state() -> dict[str, object]:
    """What transformers swaps while it loads, by name, and what a load could forget to put back."""
    places = {
        "PreTrainedModel": vars(PreTrainedModel),
        "torch.nn.init": vars(torch.nn.init),
        "torch.nn.Module": vars(torch.nn.Module),
        "transformers.initialization": vars(initialization),
        "modeling_utils": vars(modeling_utils),
        "torch": {name: getattr(torch, name) for name in ("arange", "linspace", "tensor", "empty", "ones", "zeros")},
    }
    state = {f"{place}.{name}": value for place, names in places.items() for name, value in names.items()}
    return state | {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "functions under modes": torch._C._len_torch_function_stack(),
    }
