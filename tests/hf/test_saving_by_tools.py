"""save_pretrained as other tools call it: Trainer, pipelines, uploads."""

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
import transformers

from fastload import hf
from tests.hf.saved import assert_same_checkpoint, assert_same_model, assert_same_tensors, made, weights


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    hf.reset_stats()
    yield
    hf.reset_stats()


class Lines(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Text of no meaning, to train on."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(index, index + 6)
        return {"input_ids": tokens, "labels": tokens}


def trainer(model: Any, folder: Path, **options: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="epoch", seed=0, **options,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Lines(), eval_dataset=Lines())


# torch's own scheduler and loader warn of what is Trainer's business.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["bert", "moe"])
def test_trainer_saves_what_it_saves_with_transformers(tmp_path: Path, name: str) -> None:
    with hf.enabled():
        first = trainer(made(name), tmp_path / "run")
        first.train()
        first.save_model(str(tmp_path / "fastload"))
    assert hf.stats().fast_saves == 3
    assert hf.stats().handed_over_saves == 0
    first.save_model(str(tmp_path / "transformers"))
    assert hf.stats().fast_saves == 3
    assert {"model.safetensors", "trainer_state.json"} <= set(os.listdir(tmp_path / "run" / "checkpoint-4"))
    for folder in ("fastload", "transformers"):
        (tmp_path / folder / "training_args.bin").unlink()
    assert_same_checkpoint(tmp_path / "fastload", tmp_path / "transformers")


@pytest.mark.filterwarnings("default")
def test_trainer_resumes_from_what_it_saved(tmp_path: Path) -> None:
    with hf.enabled():
        first = trainer(made("bert"), tmp_path / "run")
        first.train()
        again = trainer(made("bert"), tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.state.global_step == 4
    assert_same_tensors(again.model.state_dict(), first.model.state_dict())


@pytest.mark.filterwarnings("default")
def test_trainer_gives_back_the_best_model(tmp_path: Path) -> None:
    with hf.enabled():
        best = trainer(
            made("bert"), tmp_path / "run", eval_strategy="epoch", load_best_model_at_end=True, learning_rate=1e-2
        )
        best.train()
    assert best.state.best_model_checkpoint
    found = {**best.model.state_dict()}
    checkpoint = Path(best.state.best_model_checkpoint)
    (checkpoint / "training_args.bin").unlink()
    kept = weights(checkpoint)
    assert_same_tensors({key: found[key] for key in kept}, kept)


def test_pipeline_saves_its_model(tmp_path: Path) -> None:
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    pipe = transformers.pipeline("fill-mask", model=made("bert"), tokenizer=tokenizer, device="cpu")
    with hf.enabled():
        pipe.save_pretrained(tmp_path / "fastload", safe_serialization=False)
    pipe.save_pretrained(tmp_path / "transformers")
    assert hf.stats().fast_saves == 1
    assert "pytorch_model.bin" in os.listdir(tmp_path / "fastload")
    ours, stock = (
        transformers.pipeline("fill-mask", model=str(tmp_path / folder), device="cpu")
        for folder in ("fastload", "transformers")
    )
    assert_same_model(ours.model, stock.model)
    assert ours("a [MASK] b") == stock("a [MASK] b")


class Hub:
    """A model hub on this machine that takes commits, over real HTTP. It has no repository until one is made.

    Attributes:
        url: what HF_ENDPOINT is to be set to.
        created: what was asked for when a repository was made.
        commits: (summary, name -> content) of every commit.
    """

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})

    def do_GET(self) -> None:
        self.do_HEAD()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            self._answer(200, {"url": f"{self.hub.url}/someone/{json.loads(body)['name']}"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif re.match(r"/api/models/someone/\w+/preupload/main", self.path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif re.match(r"/api/models/someone/\w+/commit/main", self.path):
            header, *files = [json.loads(line)["value"] for line in body.splitlines()]
            content = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.hub.commits.append((header["summary"], content))
            self._answer(200, {"commitUrl": f"{self.hub.url}/someone/mine/commit/{1:040}", "commitOid": f"{1:040}"})
        else:
            self._answer(404, {"error": f"no such route: {self.path}"})

    def _answer(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


UPLOAD = """
import sys
from fastload.hf import save_pretrained
from tests.hf.saved import made
model = made("bert")
model.add_model_tags(["made-by-hand"])
for folder, save in zip(sys.argv[2:], (save_pretrained, type(model).save_pretrained)):
    save(model, folder, push_to_hub=True, token="hf_test", private=True, **eval(sys.argv[1]))
"""


@pytest.mark.parametrize("options", [{}, {"repo_id": "mine", "commit_message": "Better than before"}], ids=str)
def test_model_is_uploaded_as_transformers_does(tmp_path: Path, hub: Hub, options: dict[str, str]) -> None:
    folders = [tmp_path / whose / "model" for whose in ("fastload", "transformers")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{}")
    # A process of its own: where the hub is, is read when its client is imported.
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD, repr(options), *map(str, folders)],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for folder, (_, content) in zip(folders, hub.commits, strict=True):
        names = ("README.md", "config.json", "model.safetensors")
        assert content == {name: (folder / name).read_bytes() for name in names}
    (ours, stock), (ours_made, stock_made) = hub.commits, hub.created
    assert ours_made == stock_made
    assert ours_made["name"] == options.get("repo_id", "model")
    assert "private" in json.dumps(ours_made)
    assert ours[0] == stock[0] == options.get("commit_message", "Upload BertForMaskedLM")
    assert ours[1]["README.md"] == stock[1]["README.md"]
    assert b"made-by-hand" in ours[1]["README.md"]
