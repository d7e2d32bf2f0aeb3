"""The real client of the hub against a server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastload.errors import CheckpointNotFoundError, ConfigError, HubError, IndexFileError, OptionError
from fastload.formats.index import encode_index
from fastload.options import FileOptions, HubOptions
from fastload.sources.hub import pinned
from fastload.sources.resolve import locate_checkpoint, locate_config
from tests.sources.checkpoints import CONFIG, bin_bytes, safetensors_bytes, sharded, write
from tests.sources.hub_server import HubServer

pytest.importorskip("huggingface_hub")

SINGLE = {"config.json": CONFIG, "model.safetensors": safetensors_bytes()}
BIN_INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def cache(tmp_path: Path) -> HubOptions:
    return HubOptions(cache_dir=tmp_path / "cache")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits for half a minute between attempts at a server that is down."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def cached(hub: HubOptions, **changes: object) -> HubOptions:
    return HubOptions(**{"cache_dir": hub.cache_dir, **changes})  # type: ignore[arg-type]


# What is fetched


def test_single_file_is_fetched(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", {**SINGLE, "README.md": b"", "pytorch_model.bin": b""})
    assert Path(locate_config("org/name", hub=cache)).read_bytes() == CONFIG
    files = locate_checkpoint("org/name", hub=cache)
    assert Path(files.weights[0]).read_bytes() == SINGLE["model.safetensors"]
    assert server.fetched() == ["config.json", "model.safetensors"]


def test_name_without_owner_is_fetched(server: HubServer, cache: HubOptions) -> None:
    server.push("bert-base-cased", SINGLE)
    assert len(locate_checkpoint("bert-base-cased", hub=cache).weights) == 1


def test_all_shards_of_an_index_are_fetched(server: HubServer, cache: HubOptions) -> None:
    content = sharded()
    server.push("org/name", content)
    files = locate_checkpoint("org/name", hub=cache)
    assert {os.path.basename(path): Path(path).read_bytes() for path in (*files.weights, files.index or "")} == content
    assert server.fetched() == sorted(content)


def test_shards_in_folders_and_with_odd_names_are_fetched(server: HubServer, cache: HubOptions) -> None:
    names = ["parts/a b.safetensors", "parts/[1]%20.safetensors"]
    server.push("org/name", sharded(shards=names))
    files = locate_checkpoint("org/name", hub=cache)
    assert sorted(os.path.relpath(path, files.folder) for path in files.weights) == sorted(names)


def test_bin_is_fetched_where_there_is_no_safetensors(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", {"pytorch_model.bin": bin_bytes()})
    assert locate_checkpoint("org/name", hub=cache).format == "bin"


def test_sharded_bin_is_fetched_last_of_all(server: HubServer, cache: HubOptions) -> None:
    content = sharded(BIN_INDEX, ["pytorch_model-00001-of-00001.bin"])
    content["pytorch_model-00001-of-00001.bin"] = bin_bytes("layer.0")
    server.push("org/name", content)
    files = locate_checkpoint("org/name", hub=cache)
    assert files.format == "bin"
    assert os.path.basename(files.index or "") == BIN_INDEX


def test_options_choose_format_variant_and_subfolder(server: HubServer, cache: HubOptions) -> None:
    names = ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "sub/model.safetensors"]
    server.push("org/name", {name: safetensors_bytes(name) for name in names} | {"sub/config.json": CONFIG})
    for options, name in [
        (FileOptions(use_safetensors=False), "pytorch_model.bin"),
        (FileOptions(variant="fp16"), "model.fp16.safetensors"),
        (FileOptions(subfolder="sub"), "sub/model.safetensors"),
    ]:
        files = locate_checkpoint("org/name", options, cache)
        assert Path(files.weights[0]).read_bytes() == safetensors_bytes(name)
    assert locate_config("org/name", subfolder="sub", hub=cache).endswith("sub/config.json")


def test_order_decides_where_a_repository_holds_two_checkpoints(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", {**SINGLE, **sharded()})
    import huggingface_hub

    huggingface_hub.snapshot_download("org/name", cache_dir=cache.cache_dir, endpoint=server.url)
    files = locate_checkpoint("org/name", hub=cache)
    assert [os.path.basename(path) for path in files.weights] == ["model.safetensors"]


# Revisions


def test_branch_tag_and_commit_are_revisions(server: HubServer, cache: HubOptions) -> None:
    first = server.push("org/name", {"config.json": b"1"})
    server.push("org/name", {"config.json": b"2"})
    server.push("org/name", {"config.json": b"3"}, branch="pr/1")
    for revision, content in [(None, b"2"), ("main", b"2"), (first, b"1"), ("pr/1", b"3")]:
        path = locate_config("org/name", hub=cached(cache, revision=revision))
        assert Path(path).read_bytes() == content


@pytest.mark.parametrize("n_answered", [1, 2, 3, 5])
def test_push_in_between_does_not_mix_two_commits(server: HubServer, cache: HubOptions, n_answered: int) -> None:
    old = sharded()
    server.push("org/name", old)
    new = {name: b"of another commit" if name.endswith(".safetensors") else c for name, c in old.items()}

    def push_once(request: str) -> None:
        if len(server.requests) == n_answered + 1:
            server.push("org/name", new)

    server.on_request = push_once
    files = locate_checkpoint("org/name", hub=cache)
    assert {os.path.basename(path): Path(path).read_bytes() for path in (*files.weights, files.index or "")} == old


def test_config_and_weights_can_be_pinned_to_one_commit(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", SINGLE)
    config = locate_config("org/name", hub=cache)
    server.push("org/name", {**SINGLE, "model.safetensors": b"newer"})
    files = locate_checkpoint("org/name", hub=pinned(cache, config))
    assert Path(files.weights[0]).read_bytes() == SINGLE["model.safetensors"]


def test_absent_revision_is_told(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", SINGLE)
    for locate in (locate_config, locate_checkpoint):
        with pytest.raises(HubError, match="no such revision"):
            locate("org/name", hub=cached(cache, revision="v9"))


# The cache


def test_pinned_files_in_the_cache_need_no_request(server: HubServer, cache: HubOptions) -> None:
    commit = server.push("org/name", SINGLE)
    hub = cached(cache, revision=commit)
    locate_checkpoint("org/name", hub=hub)
    server.requests.clear()
    locate_checkpoint("org/name", hub=hub)
    assert server.requests == []


def test_force_download_fetches_again(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", SINGLE)
    locate_config("org/name", hub=cache)
    server.requests.clear()
    locate_config("org/name", hub=cache)
    assert server.fetched() == []
    locate_config("org/name", hub=cached(cache, force_download=True))
    assert server.fetched() == ["config.json"]


@pytest.mark.parametrize("content", [SINGLE, {"config.json": CONFIG, **sharded()}, {**SINGLE, **sharded()}])
@pytest.mark.parametrize("way", ["option", "environment"])
def test_cached_checkpoint_loads_offline(
    server: HubServer, cache: HubOptions, monkeypatch: pytest.MonkeyPatch, content: dict[str, bytes], way: str
) -> None:
    server.push("org/name", content)
    online = locate_checkpoint("org/name", hub=cache), locate_config("org/name", hub=cache)
    server.requests.clear()
    if way == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = cached(cache, local_files_only=way == "option")
    assert (locate_checkpoint("org/name", hub=hub), locate_config("org/name", hub=hub)) == online
    assert server.requests == []


def test_offline_process_loads_from_the_cache_and_says_what_is_not_there(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", SINGLE)
    locate_checkpoint("org/name", hub=cache)
    program = f"""
from fastload.errors import HubError
from fastload.options import HubOptions
from fastload.sources.resolve import locate_checkpoint
hub = HubOptions(cache_dir={str(cache.cache_dir)!r})
print(len(locate_checkpoint("org/name", hub=hub).weights))
try:
    locate_checkpoint("org/other", hub=hub)
except HubError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "1\nnot in the download cache, and the network is turned off\n  file:     org/other\n"
    )


@pytest.mark.parametrize("locate", [locate_config, locate_checkpoint])
def test_offline_and_not_cached_is_told(server: HubServer, cache: HubOptions, locate: object) -> None:
    server.push("org/name", SINGLE)
    with pytest.raises(HubError, match=r"network is turned off(.|\n)*without local_files_only"):
        locate("org/name", hub=cached(cache, local_files_only=True))  # type: ignore[operator]


def test_offline_and_some_shards_not_cached_is_told_with_their_names(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", sharded())
    files = locate_checkpoint("org/name", hub=cache)
    os.unlink(files.weights[1])
    with pytest.raises(HubError, match=r"in the cache: model-00002-of-00003\.safetensors\n"):
        locate_checkpoint("org/name", hub=cached(cache, local_files_only=True))


@pytest.mark.usefixtures("no_waiting")
def test_cached_checkpoint_loads_when_the_hub_is_down(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", sharded())
    online = locate_checkpoint("org/name", hub=cache)
    server.failing_status = 503
    assert locate_checkpoint("org/name", hub=cache) == online
    server.close()
    assert locate_checkpoint("org/name", hub=cache) == online


def test_force_download_offline_is_rejected(server: HubServer, cache: HubOptions) -> None:
    with pytest.raises(OptionError, match="force_download needs the network"):
        locate_config("org/name", hub=cached(cache, force_download=True, local_files_only=True))


# Refusals


@pytest.mark.parametrize("locate", [locate_config, locate_checkpoint])
def test_absent_repository_is_told(server: HubServer, cache: HubOptions, locate: object) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no repository that this user may see(.|\n)*spelling"):
        locate("org/none", hub=cache)  # type: ignore[operator]


def test_private_repository_looks_absent_without_its_token(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", SINGLE, token="hf_secret")
    with pytest.raises(CheckpointNotFoundError, match=r"for a private repository(.|\n)*token="):
        locate_config("org/name", hub=cache)
    assert locate_config("org/name", hub=cached(cache, token="hf_secret"))


@pytest.mark.parametrize("token", [None, False, "hf_of_another"])
def test_gated_repository_is_told(server: HubServer, cache: HubOptions, token: str | bool | None) -> None:
    server.push("org/name", SINGLE, token="hf_secret", gated=True)
    with pytest.raises(HubError, match=r"is gated(.|\n)*ask for access"):
        locate_config("org/name", hub=cached(cache, token=token))
    assert locate_config("org/name", hub=cached(cache, token="hf_secret"))


def test_token_true_without_login_is_told(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", SINGLE)
    with pytest.raises(HubError, match="nobody has logged in"):
        locate_config("org/name", hub=cached(cache, token=True))


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_failing_hub_is_told_with_its_status(server: HubServer, cache: HubOptions, status: int) -> None:
    server.failing_status = status
    with pytest.raises(HubError, match=f"answered {status} for"):
        locate_checkpoint("org/name", hub=cache)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("force_download", [False, True])
def test_unreachable_hub_is_told(server: HubServer, cache: HubOptions, force_download: bool) -> None:
    server.close()
    with pytest.raises(HubError, match=r"could not be reached(.|\n)*check the connection"):
        locate_checkpoint("org/name", hub=cached(cache, force_download=force_download))


def test_cache_that_cannot_be_written_is_told(server: HubServer, tmp_path: Path) -> None:
    server.push("org/name", SINGLE)
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="rights of the cache folder"):
        locate_config("org/name", hub=HubOptions(cache_dir=tmp_path / "file"))


# Repositories that lack something


def test_repository_without_config_is_told_with_what_it_has(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", {"model.gguf": b"", "sub/config.json": b""})
    with pytest.raises(ConfigError, match=r"no config\.json(.|\n)*found: +model\.gguf\n"):
        locate_config("org/name", hub=cache)


def test_repository_without_weights_is_told_with_what_it_has(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", {"config.json": CONFIG, "tf_model.h5": b""})
    with pytest.raises(CheckpointNotFoundError, match=r"no weights here(.|\n)*found: +config\.json, tf_model\.h5"):
        locate_checkpoint("org/name", hub=cache)


def test_absent_variant_is_told_with_those_in_the_repository(server: HubServer, cache: HubOptions) -> None:
    server.push("org/name", {"sub/model.fp16.safetensors": b""})
    with pytest.raises(CheckpointNotFoundError, match="pass variant='fp16'"):
        locate_checkpoint("org/name", FileOptions(variant="bf16", subfolder="sub"), cache)


def test_shards_that_the_repository_lacks_are_told(server: HubServer, cache: HubOptions) -> None:
    content = sharded()
    del content["model-00001-of-00003.safetensors"], content["model-00003-of-00003.safetensors"]
    server.push("org/name", content)
    with pytest.raises(CheckpointNotFoundError, match="2 of 3 shards") as caught:
        locate_checkpoint("org/name", hub=cache)
    assert caught.value.expected == "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors"


def test_index_that_leaves_its_folder_fetches_nothing(server: HubServer, cache: HubOptions) -> None:
    index = encode_index({"a": "../../../../etc/passwd"}, 1, 1).encode()
    server.push("org/name", {"model.safetensors.index.json": index})
    with pytest.raises(IndexFileError, match="leaves the folder"):
        locate_checkpoint("org/name", hub=cache)
    assert server.fetched() == ["model.safetensors.index.json"]


def test_folder_can_be_pushed(server: HubServer, cache: HubOptions, tmp_path: Path) -> None:
    server.push("org/name", write(tmp_path / "saved", SINGLE))
    assert len(locate_checkpoint("org/name", hub=cache).weights) == 1
