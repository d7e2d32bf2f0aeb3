"""From what a caller names, a path or a hub id, to local files."""

from __future__ import annotations

import os
import re

from fastload.errors import CheckpointNotFoundError, ConfigError
from fastload.options import FileOptions, HubOptions
from fastload.sources.hub import fetch_companion, fetch_config, fetch_weights, pinned
from fastload.sources.journal import view_folder
from fastload.sources.local import ANY_FILES, CheckpointFiles, checkpoint_folder, find_weights, path_kind
from fastload.sources.names import CONFIG_NAME

__all__ = ["DEFAULT_HUB", "is_hub_id", "locate_checkpoint", "locate_companion", "locate_config", "pinned"]

#: How the hub is asked where a caller says nothing.
DEFAULT_HUB = HubOptions()

_FILE_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt")
# What the hub allows: one name, or owner/name, of letters, digits, and single '-' '_' '.' within.
_HUB_NAME = r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"({_HUB_NAME}/)?{_HUB_NAME}")


def locate_config(path_or_id: str | os.PathLike[str], *, subfolder: str = "", hub: HubOptions = DEFAULT_HUB) -> str:
    """Path of the config.json in a checkpoint folder, beside a weights file, or of a hub repository.

    Raises:
        ConfigError: the folder or the repository has none.
        CheckpointNotFoundError: there is no such folder, file or repository.
        UnreadableFileError: the operating system refused to read.
        HubError: the hub could not be asked, or refused.
    """
    subfolder = FileOptions(subfolder=subfolder).subfolder  # checked there
    if is_hub_id(path_or_id):
        return fetch_config(os.fspath(path_or_id), subfolder, hub)
    path = os.path.abspath(os.path.expanduser(path_or_id))
    if path_kind(path) == "folder":
        folder = checkpoint_folder(path, subfolder)
    else:
        folder = os.path.dirname(path)
        if path_kind(view_folder(folder).path(os.path.basename(path))) is None:
            raise _nothing_at(path_or_id)
    config = view_folder(folder).path(CONFIG_NAME)
    if path_kind(config) != "file":
        raise ConfigError(
            f"the folder has no {CONFIG_NAME}",
            file=folder,
            expected=f"{CONFIG_NAME}, which names the architecture, beside the weights",
            found="nothing of that name" if path_kind(config) is None else "a folder of that name",
            fix="copy it from where the weights came from, or give the subfolder that holds both",
        )
    return config


def locate_companion(
    path_or_id: str | os.PathLike[str], name: str, *, subfolder: str = "", hub: HubOptions = DEFAULT_HUB
) -> str | None:
    """Path of a file that may lie beside a checkpoint's config, such as generation_config.json; None where it does not.

    Raises as ``locate_config`` does, but for a file that is not there.
    """
    if is_hub_id(path_or_id):
        return fetch_companion(os.fspath(path_or_id), name, subfolder, hub)
    path = os.path.abspath(os.path.expanduser(path_or_id))
    folder = checkpoint_folder(path, subfolder) if path_kind(path) == "folder" else os.path.dirname(path)
    file = view_folder(folder).path(name)
    return file if path_kind(file) == "file" else None


def locate_checkpoint(
    path_or_id: str | os.PathLike[str], files: FileOptions = ANY_FILES, hub: HubOptions = DEFAULT_HUB
) -> CheckpointFiles:
    """The weights of a local folder or file, or of a hub repository (fetched if they are not cached).

    Raises as ``find_weights`` does, and HubError where the hub could not be asked, or refused.
    """
    if is_hub_id(path_or_id):
        # The file and not its folder: the cache may hold further weights of the snapshot.
        return find_weights(fetch_weights(os.fspath(path_or_id), files, hub))
    path = os.path.expanduser(path_or_id)
    if path_kind(path) is None and not _is_named_by_journal(path):
        raise _nothing_at(path_or_id)
    return find_weights(path, files)


def is_hub_id(path_or_id: str | os.PathLike[str]) -> bool:
    """True for a hub id, False for a path. What exists locally is a path, and so is what can only be one.

    Raises:
        CheckpointNotFoundError: it is neither an existing path nor a possible hub id.
    """
    if not isinstance(path_or_id, str):
        return False
    if _looks_like_path(path_or_id) or path_kind(path_or_id) is not None:
        return False
    if not _HUB_ID.fullmatch(path_or_id) or path_or_id.endswith(".git"):
        raise CheckpointNotFoundError(
            f"{path_or_id!r} is neither a local folder nor a possible hub id",
            expected="the path of a folder or file that exists, or a hub id: 'name' or 'owner/name'",
            found=f"no such file in {os.getcwd()}, and characters that no hub id has" if path_or_id else "no text",
            fix="check the spelling",
        )
    return True


def _looks_like_path(text: str) -> bool:
    return (
        os.path.isabs(text)
        or text in (".", "..")
        or text.startswith(("./", "../", "~"))
        or text.endswith((os.sep, *_FILE_SUFFIXES))
        or text.count("/") > 1
    )


def _is_named_by_journal(path: str) -> bool:
    folder, name = os.path.split(os.path.abspath(path))
    return path_kind(view_folder(folder).path(name)) is not None


def _nothing_at(path_or_id: str | os.PathLike[str]) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        "there is no such file or folder",
        file=path_or_id,
        expected="a checkpoint's folder, a weights file or an index; or a hub id such as 'owner/name'",
        found="nothing; it was read as a path, and the hub was not asked",
        fix=f"check the path (a relative one starts from {os.getcwd()})",
    )
