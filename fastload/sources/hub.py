"""Fetching a checkpoint's files from a model hub, through huggingface_hub and its cache.

The one module that imports huggingface_hub, and only when a file is fetched: a local load never pays for it.
All files that one call fetches are of one commit: the first answer tells which, and the others ask for that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from fastload import __version__
from fastload.errors import (
    CheckpointNotFoundError,
    ConfigError,
    FastloadError,
    HubError,
    MissingDependencyError,
    OptionError,
)
from fastload.formats.index import read_index
from fastload.options import FileOptions, HubOptions
from fastload.sources.names import CONFIG_NAME, candidates, listed, nothing_found

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["fetch_companion", "fetch_config", "fetch_weights", "pinned", "upload"]

_PARALLEL_DOWNLOADS = 8
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")
_TRUE = ("1", "ON", "YES", "TRUE")


def fetch_config(repo_id: str, subfolder: str, hub: HubOptions) -> str:
    """Path of the repository's config.json in the cache.

    Raises:
        ConfigError: the repository has none.
        CheckpointNotFoundError: there is no such repository.
        HubError: the hub refused, cannot be reached, or has no such revision.
    """
    repository = _Repository(repo_id, subfolder, hub)
    path = repository.fetch(CONFIG_NAME)
    if path is None:
        repository.raise_if_unreachable()
        raise ConfigError(
            f"the repository has no {CONFIG_NAME}",
            file=repository.where,
            expected=f"{CONFIG_NAME}, which names the architecture",
            found=listed(repository.names() or ()),
            fix="give the subfolder that holds it, or another repository",
        )
    return path


def fetch_companion(repo_id: str, name: str, subfolder: str, hub: HubOptions) -> str | None:
    """Path in the cache of a file that a repository may have beside its config.

    None if it has none, or cannot be asked. Raises HubError where the hub refused.
    """
    return _Repository(repo_id, subfolder, hub).fetch(name)


def fetch_weights(repo_id: str, files: FileOptions, hub: HubOptions) -> str:
    """Path in the cache of the repository's weights file, or of its index once all its shards are beside it.

    The choice is that of ``find_weights``, except that the order decides where a repository holds two
    checkpoints of one format: its reader cannot delete the stale one.

    Raises as ``fetch_config``, but CheckpointNotFoundError where there is nothing to choose from.
    """
    repository = _Repository(repo_id, files.subfolder, hub)
    for candidate in candidates(files):
        for name in candidate.names:
            path = repository.fetch(name)
            if path is not None:
                if name == candidate.index:
                    repository.fetch_shards(read_index(path).shards, name)
                return path
    repository.raise_if_unreachable()
    names = repository.names()
    if names is None:
        raise CheckpointNotFoundError(
            "the repository has no weights under any name that is looked for",
            file=repository.where,
            expected=" or ".join(name for candidate in candidates(files) for name in candidate.names),
            fix="look at the repository's files; a subfolder or a variant may be needed",
        )
    raise nothing_found(repository.where, names, files)


def pinned(hub: HubOptions, path: str) -> HubOptions:
    """``hub`` with its revision set to the commit that ``path`` was fetched from; unchanged for a local file.

    For a config and weights that are fetched one after the other: both are then of one commit, even when
    someone pushes to the repository in between.
    """
    match = _SNAPSHOT.search(path)
    return replace(hub, revision=match[1]) if match else hub


def upload(
    folder: str,
    names: Iterable[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
) -> str:
    """Upload files of a folder to a repository, which is made if need be, in one commit. Returns the commit's address.

    Raises:
        HubError, CheckpointNotFoundError: the hub refused, or cannot be reached.
    """
    api = _huggingface_hub().HfApi(
        endpoint=os.environ.get("HF_ENDPOINT") or None,
        token=token,
        library_name="fastload",
        library_version=__version__,
    )
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in names],
            commit_message=commit_message or "Upload weights with fastload",
        )
    except Exception as error:
        raise _explained(error, repo_id, "the upload", is_network_off=False) from error
    return str(done.commit_url)


class _Repository:
    """A repository at the commit of its first answer; once it cannot be reached, what the cache has of it."""

    def __init__(self, repo_id: str, subfolder: str, hub: HubOptions) -> None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
        if hub.force_download and (hub.local_files_only or offline):
            raise OptionError(
                "force_download needs the network, which is turned off",
                found="local_files_only=True" if hub.local_files_only else "HF_HUB_OFFLINE in the environment",
                fix="leave one of the two out",
            )
        self._repo_id = repo_id
        self._subfolder = "" if not subfolder else os.path.normpath(subfolder).replace(os.sep, "/")
        self._hub = replace(hub, local_files_only=True) if offline else hub
        self._is_network_off = self._hub.local_files_only
        # Read now rather than when huggingface_hub was imported; None leaves it to huggingface_hub.
        self._endpoint = os.environ.get("HF_ENDPOINT") or None
        self._unreachable: Exception | None = None

    @property
    def where(self) -> str:
        """Name of the repository, its revision and subfolder for messages."""
        revision = f" at {self._hub.revision}" if self._hub.revision else ""
        return "/".join(part for part in (self._repo_id, self._subfolder) if part) + revision

    def fetch(self, name: str) -> str | None:
        """Path of a file in the cache, fetched if need be; None if repository (or cache, offline) lacks it."""
        errors = _huggingface_hub().errors
        try:
            path = self._download(name)
        except errors.LocalEntryNotFoundError as error:
            # From here on what is cached must do: each further name would wait for the network again.
            self._unreachable = self._unreachable or error
            self._hub = replace(self._hub, local_files_only=True)
            return None
        except errors.EntryNotFoundError as error:
            response = getattr(error, "response", None)
            self._pin("" if response is None else response.headers.get("X-Repo-Commit", ""))
            return None
        except Exception as error:
            raise self._explained(error, name) from error
        match = _SNAPSHOT.search(path)
        self._pin(match[1] if match else "")
        return path

    def fetch_shards(self, names: Iterable[str], index_name: str) -> None:
        """Have all of these in the cache, several at a time."""
        names = list(names)
        with ThreadPoolExecutor(_PARALLEL_DOWNLOADS, thread_name_prefix="fastload-hub") as pool:
            try:
                paths = list(pool.map(self.fetch, names))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        missing = [name for name, path in zip(names, paths, strict=True) if path is None]
        if not missing:
            return
        if self._unreachable is not None:
            raise self._explained(self._unreachable, ", ".join(missing)) from self._unreachable
        raise CheckpointNotFoundError(
            f"{len(missing)} of {len(names)} shards that the index names are missing in the repository",
            file=f"{index_name} of {self.where}",
            expected=", ".join(missing),
            found=listed(name for name in names if name not in missing),
            fix="tell the repository's owner, or ask for another revision",
        )

    def names(self) -> list[str] | None:
        """Names of the files in the repository's subfolder; None where the hub does not tell."""
        api = _huggingface_hub().HfApi(endpoint=self._endpoint, token=self._hub.token)
        try:
            siblings = api.model_info(self._repo_id, revision=self._hub.revision).siblings or []
        except Exception:  # noqa: BLE001  this serves a better message, and must not replace it
            return None
        prefix = f"{self._subfolder}/" if self._subfolder else ""
        paths = [file.rfilename for file in siblings if file.rfilename.startswith(prefix)]
        return [path[len(prefix) :] for path in paths if "/" not in path[len(prefix) :]]

    def raise_if_unreachable(self) -> None:
        """Raise if what was looked for may exist, and the hub could not be asked."""
        if self._unreachable is not None:
            raise self._explained(self._unreachable, "config or weights") from self._unreachable

    def _download(self, name: str) -> str:
        path: str = _huggingface_hub().hf_hub_download(
            self._repo_id,
            name,
            subfolder=self._subfolder or None,
            revision=self._hub.revision,
            token=self._hub.token,
            cache_dir=self._hub.cache_dir,
            local_files_only=self._hub.local_files_only,
            force_download=self._hub.force_download,
            endpoint=self._endpoint,
            library_name="fastload",
            library_version=__version__,
        )
        return path

    def _pin(self, commit: str) -> None:
        if _COMMIT.fullmatch(commit):
            self._hub = replace(self._hub, revision=commit)

    def _explained(self, error: Exception, name: str) -> FastloadError:
        return _explained(error, self.where, name, is_network_off=self._is_network_off)


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingDependencyError(
            "a hub id needs the package huggingface_hub",
            fix="pip install huggingface_hub, or give a local path",
        ) from error
    return huggingface_hub


def _explained(error: Exception, where: str, name: str, *, is_network_off: bool) -> FastloadError:
    """What an exception of huggingface_hub, or from below it, means to who wanted ``name`` from ``where``."""
    errors = _huggingface_hub().errors
    cause = _root(error)
    if isinstance(cause, errors.OfflineModeIsEnabled) or (
        is_network_off and isinstance(cause, errors.LocalEntryNotFoundError)
    ):
        return HubError(
            "not in the download cache, and the network is turned off",
            file=where,
            expected=f"in the cache: {name}",
            fix="fetch it once with the network on: without local_files_only, and HF_HUB_OFFLINE unset",
        )
    if isinstance(cause, errors.HFValidationError):
        return CheckpointNotFoundError(
            "neither a local folder nor a hub id",
            file=where,
            found=_first_line(cause),
            fix="check the spelling",
        )
    if isinstance(cause, errors.LocalTokenNotFoundError):
        return HubError("token=True, but nobody has logged in", file=where, fix="run 'hf auth login', or pass a token")
    if isinstance(cause, errors.HfHubHTTPError):
        return _explained_answer(cause, where, name)
    if isinstance(cause, OSError) and cause.errno is not None and type(cause).__module__ == "builtins":
        return HubError(
            f"{name} could not be fetched or put into the download cache: {_first_line(cause)}",
            file=cause.filename or where,
            fix="check the free space and the rights of the cache folder; cache_dir= names another",
        )
    return HubError(
        f"the hub could not be reached for {name}, and the download cache does not have it",
        file=where,
        found=f"{type(cause).__name__}: {_first_line(cause)}",
        fix="check the connection, the proxy and HF_ENDPOINT, then try again",
    )


def _explained_answer(cause: Exception, where: str, name: str) -> FastloadError:
    """What a refusal by the hub itself means."""
    errors = _huggingface_hub().errors
    if isinstance(cause, errors.GatedRepoError):
        return HubError(
            "the repository is gated: its owner grants access",
            file=where,
            found=_first_line(cause),
            fix="ask for access on the repository's page, then run 'hf auth login' or pass token=",
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return CheckpointNotFoundError(
            "there is no local folder of this name, and no repository that this user may see",
            file=where,
            found=_first_line(cause),
            fix="check the spelling; for a private repository run 'hf auth login' or pass token=",
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return HubError(
            "the repository has no such revision",
            file=where,
            found=_first_line(cause),
            fix="pass a branch, tag or commit that exists, or leave revision out",
        )
    status = getattr(getattr(cause, "response", None), "status_code", None)
    fixes = {
        401: "the token is not valid: run 'hf auth login' again, or pass another token=",
        403: "the token may not read this repository: pass one that may",
        429: "too many requests: wait, or log in for a higher limit",
    }
    return HubError(
        f"the hub answered {status} for {name}, and the download cache does not have it",
        file=where,
        found=_first_line(cause),
        fix=fixes.get(status or 0, "try again later"),
    )


def _root(error: Exception) -> Exception:
    """The exception that says what happened, below those that say that something did."""
    errors = _huggingface_hub().errors
    while isinstance(error.__cause__, Exception) and (
        isinstance(error, errors.LocalEntryNotFoundError) or type(error) is ValueError
    ):
        error = error.__cause__
    return error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
