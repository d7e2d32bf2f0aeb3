"""Models from a hub: the real client, a server on this machine, and the commit that everything is of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastload
from fastload.errors import CheckpointNotFoundError, HubError
from tests.sources.hub_server import HubServer

TINY = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def files_of(folder: Path, seed: int, **options: object) -> tuple[dict[str, bytes], fastload.BertModel]:
    torch.manual_seed(seed)
    model = fastload.BertModel(fastload.BertConfig(**TINY)).eval()
    model.save_pretrained(folder, **options)  # type: ignore[arg-type]
    return {path.name: path.read_bytes() for path in folder.iterdir()}, model


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    state = b.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10kB"}, {"safe_serialization": False}], ids=str)
def test_a_model_comes_from_a_hub_and_then_from_the_cache(
    server: HubServer, tmp_path: Path, options: dict[str, object]
) -> None:
    files, original = files_of(tmp_path / "made", 0, **options)
    server.push("org/tiny", files)
    model = fastload.AutoModel.from_pretrained("org/tiny", cache_dir=tmp_path / "cache")
    assert same_weights(model, original)
    assert model.name_or_path == "org/tiny"
    assert fastload.report(model).mapped_share == 1.0
    server.close()
    again = fastload.BertModel.from_pretrained("org/tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    assert same_weights(again, original)


def test_a_revision_is_what_its_name_says(server: HubServer, tmp_path: Path) -> None:
    old_files, old = files_of(tmp_path / "old", 1)
    new_files, new = files_of(tmp_path / "new", 2)
    commit = server.push("org/tiny", old_files)
    server.push("org/tiny", new_files)
    load = fastload.AutoModel.from_pretrained
    assert same_weights(load("org/tiny", cache_dir=tmp_path / "cache"), new)
    assert same_weights(load("org/tiny", cache_dir=tmp_path / "cache", revision=commit), old)


@pytest.mark.parametrize("load", [fastload.AutoModel.from_pretrained, fastload.BertModel.from_pretrained])
def test_a_push_between_config_and_weights_mixes_nothing(server: HubServer, tmp_path: Path, load: object) -> None:
    old_files, old = files_of(tmp_path / "old", 1)
    new_files, _ = files_of(tmp_path / "new", 2)
    server.push("org/tiny", old_files)

    pushed = []

    def push_after_config(request: str) -> None:
        if request.startswith("GET") and "config.json" in request and not pushed:
            pushed.append(server.push("org/tiny", new_files))

    server.on_request = push_after_config
    model = load("org/tiny", cache_dir=tmp_path / "cache")  # type: ignore[operator]
    assert len(pushed) == 1
    assert same_weights(model, old)


def test_a_repository_that_is_not_there_is_named(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises((CheckpointNotFoundError, HubError), match="org/absent"):
        fastload.AutoModel.from_pretrained("org/absent", cache_dir=tmp_path)


def test_open_checkpoint_and_load_state_dict_take_a_hub_id(server: HubServer, tmp_path: Path) -> None:
    files, original = files_of(tmp_path / "made", 0)
    server.push("org/tiny", files)
    state = fastload.load_state_dict("org/tiny", cache_dir=tmp_path / "cache")
    assert torch.equal(state["pooler.dense.weight"], original.pooler.dense.weight)
    assert "pooler.dense.weight" in fastload.open_checkpoint("org/tiny", cache_dir=tmp_path / "cache")
