from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastload.errors import CheckpointNotFoundError, ConfigError, OptionError
from fastload.options import FileOptions, HubOptions
from fastload.sources.hub import pinned
from fastload.sources.resolve import is_hub_id, locate_checkpoint, locate_config
from tests.sources.checkpoints import CONFIG, safetensors_bytes, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"model.safetensors": safetensors_bytes(), "config.json": CONFIG}
    return write(tmp_path / "models" / "bert", {**files, **{f"sub/{name}": files[name] for name in files}})


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def test_folder_gives_config_and_weights(folder: Path) -> None:
    assert locate_config(folder) == str(folder / "config.json")
    assert locate_checkpoint(str(folder)).weights == (str(folder / "model.safetensors"),)


def test_subfolder_gives_its_own(folder: Path) -> None:
    assert locate_config(folder, subfolder="sub") == str(folder / "sub" / "config.json")
    files = locate_checkpoint(folder, FileOptions(subfolder="sub"))
    assert files.weights == (str(folder / "sub" / "model.safetensors"),)


def test_weights_file_has_its_config_beside_it(folder: Path) -> None:
    assert locate_config(folder / "model.safetensors") == str(folder / "config.json")


def test_existing_folder_comes_before_a_hub_id_of_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert not is_hub_id("models/bert")
    assert locate_config("models/bert") == str(folder / "config.json")
    assert is_hub_id("models/other")


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate_config("~/bert") == str(folder / "config.json")
    assert locate_checkpoint("~/bert").folder == str(folder)


@pytest.mark.parametrize("name", ["bert-base-cased", "org/name", "a", "Org_1/model.v2-x", "x" * 96])
def test_hub_ids_are_known(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "path",
    [
        "/no/such",
        "./none",
        "../none/x",
        "~/none",
        "a/b/c",
        "none/",
        "none.safetensors",
        "org/model.safetensors",
        "org/pytorch_model.bin",
        "x/model.safetensors.index.json",
        Path("org/name"),
    ],
)
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(path: str | Path) -> None:
    for locate in (locate_config, locate_checkpoint):
        with pytest.raises(CheckpointNotFoundError, match="the hub was not asked"):
            locate(path)


@pytest.mark.parametrize(
    "name", ["", "two words", "org/", "-x", "x-", ".x", "a--b", "a..b", "x.git", "ü", "x" * 97, "a\0b", "a\nb"]
)
def test_what_is_neither_path_nor_id_is_told_so(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError):
        locate_checkpoint(name)
    with pytest.raises(CheckpointNotFoundError):
        locate_config(name)


def test_both_readings_are_explained() -> None:
    with pytest.raises(CheckpointNotFoundError, match="neither a local folder nor a possible hub id") as caught:
        locate_config("two words")
    assert "a folder or file that exists, or a hub id" in str(caught.value.expected)


def test_missing_config_is_told(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json") as caught:
        locate_config(folder)
    assert caught.value.file == str(folder)


def test_config_that_is_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="a folder of that name"):
        locate_config(tmp_path)


@pytest.mark.parametrize("subfolder", ["../x", "/x", "a/../../b"])
def test_subfolder_that_leaves_the_folder_is_rejected(folder: Path, subfolder: str) -> None:
    with pytest.raises(OptionError):
        locate_config(folder, subfolder=subfolder)


def test_pinning_leaves_a_local_file_alone() -> None:
    hub = HubOptions(revision="main")
    assert pinned(hub, "/home/me/snapshots/config.json") is hub


def test_local_load_imports_neither_torch_nor_huggingface_hub(folder: Path) -> None:
    program = f"""
import sys
from fastload.sources.resolve import locate_checkpoint, locate_config
locate_config({str(folder)!r}); locate_checkpoint({str(folder)!r})
print(sorted({{"torch", "huggingface_hub", "transformers", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
