"""Files that a hub's repository may have beside config.json: fetched if there, at the commit of the weights."""

from __future__ import annotations

from pathlib import Path

import fastload
from tests.models.generation.causal import save_small
from tests.sources.hub_server import HubServer


def test_a_generation_config_comes_with_the_model(server: HubServer, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "made")
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    server.push("org/tiny", folder)
    load = fastload.AutoModelForCausalLM.from_pretrained
    assert load("org/tiny", cache_dir=tmp_path / "cache").generation_config.top_k == 3
    server.close()
    again = load("org/tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    assert again.generation_config.top_k == 3
    read = fastload.GenerationConfig.from_pretrained("org/tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    assert read == again.generation_config


def test_a_repository_without_one_is_none_the_worse(server: HubServer, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "made", eos_token_id=7)
    (folder / "generation_config.json").unlink()
    server.push("org/tiny", folder)
    model = fastload.AutoModelForCausalLM.from_pretrained("org/tiny", cache_dir=tmp_path / "cache")
    assert model.generation_config.eos_token_id == 7


def test_it_is_of_the_commit_that_the_weights_are_of(server: HubServer, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "made")
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    server.push("org/tiny", folder)
    (folder / "generation_config.json").write_text('{"top_k": 4}')

    def push(request: str) -> None:
        if request.endswith("model.safetensors"):
            server.on_request = lambda request: None
            server.push("org/tiny", folder)

    server.on_request = push
    model = fastload.AutoModelForCausalLM.from_pretrained("org/tiny", cache_dir=tmp_path / "cache")
    assert model.generation_config.top_k == 3
