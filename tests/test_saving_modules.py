"""save_model: any module, wherever its tensors are; and uploads of what was saved."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastload
from fastload.errors import OptionError, SaveError
from tests.conftest import same_bytes


class Net(nn.Module):
    """Two tied layers, a buffer, and a view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.third.weight = self.first.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("view", torch.arange(12.0).reshape(3, 4).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.third(self.second(self.first(x)))
        return result


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same_bytes(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "100B"])
def test_module_comes_back(tmp_path: Path, safe: bool, max_shard_size: str) -> None:
    module, again = Net(), Net()
    fastload.save_model(module, tmp_path, safe_serialization=safe, max_shard_size=max_shard_size)
    fastload.load_model(again, tmp_path, verify=True)
    assert_same(again, module)


def test_given_state_dict_is_saved_in_place_of_the_modules(tmp_path: Path) -> None:
    fastload.save_model(Net(), tmp_path, state_dict={"other": torch.ones(2)})
    assert fastload.load_state_dict(tmp_path).keys() == {"other"}


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    assert fastload.save_model(Net(), tmp_path / "new", is_main_process=False) is None
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_what_accelerate_keeps_on_disk_is_read_through(tmp_path: Path, safe: bool) -> None:
    from accelerate import cpu_offload, disk_offload

    expected = Net()
    for offload, options in ((cpu_offload, {}), (disk_offload, {"offload_dir": str(tmp_path / "disk")})):
        module = Net()
        module.load_state_dict(expected.state_dict())
        offload(module, execution_device=torch.device("cpu"), offload_buffers=True, **options)
        assert module.first.weight.is_meta
        fastload.save_model(module, tmp_path / "out", safe_serialization=safe)
        again = Net()
        fastload.load_model(again, tmp_path / "out")
        assert_same(again, expected)


def test_meta_tensors_that_nothing_is_behind_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(SaveError, match="meta device") as caught:
        fastload.save_model(module, tmp_path / "new")
    assert caught.value.found == "weight, bias"
    assert not (tmp_path / "new").exists()


def test_extra_state_that_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"step": 1}

    with pytest.raises(OptionError, match="_extra_state"):
        fastload.save_model(Stateful(1, 1), tmp_path / "new")


# Uploads.


class Hub(ThreadingHTTPServer):
    """The routes of a hub that an upload of small files takes, over real HTTP.

    Attributes:
        created: bodies of the requests that made repositories.
        commits: (summary, name -> content) of each commit.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Routes)
        self.created: list[dict[str, Any]] = []
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Routes(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/{json.loads(body).get('organization', 'me')}/mine"})
        elif re.fullmatch(r"/api/models/org/mine/preupload/main", self.path):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif re.fullmatch(r"/api/models/org/mine/commit/main", self.path):
            header, *files = [json.loads(line)["value"] for line in body.splitlines()]
            content = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.server.commits.append((header["summary"], content))
            self._answer({"commitUrl": f"{self.server.url}/org/mine/commit/{1:040}", "commitOid": f"{1:040}"})
        else:
            self._answer({"error": f"no such route: {self.path}"}, 404)

    def do_GET(self) -> None:
        self._answer({"id": "org/mine", "sha": f"{1:040}", "siblings": []})

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


UPLOAD = """
import sys, fastload
config = fastload.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
model = fastload.BertModel(config)
model.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="org/mine", token="hf_test", private=True)
fastload.save_model(model, sys.argv[2], push_to_hub="org/mine", token="hf_test")
"""


def test_what_was_saved_is_uploaded_and_nothing_else(tmp_path: Path, hub: Hub) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    # A process of its own: where the hub is, is read when its client is imported.
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD, *map(str, folders)],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    names = [("config.json", "model.safetensors"), ("model.safetensors",)]
    for folder, (_, content), expected in zip(folders, hub.commits, names, strict=True):
        assert content == {name: (folder / name).read_bytes() for name in expected}
    assert [summary for summary, _ in hub.commits] == ["Upload BertModel", "Upload weights with fastload"]
    assert "private" in json.dumps(hub.created[0])
