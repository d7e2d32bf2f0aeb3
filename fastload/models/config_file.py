"""Reading config.json, whatever is in it."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from fastload.errors import ConfigError, UnreadableFileError
from fastload.options import HubOptions
from fastload.sources.resolve import locate_config

__all__ = ["encode_special_floats", "find_config_file", "read_config_file"]

# Real ones have kilobytes; those with a hundred thousand labels a few megabytes.
MOST_BYTES = 64 * 2**20
# JSON has no word for these, so transformers writes them as an object with one key.
_FLOAT_KEY = "__float__"
_SPECIAL_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def find_config_file(path: str | os.PathLike[str], *, subfolder: str, hub: HubOptions) -> str:
    """The local config file of a checkpoint folder or a hub id; ``path`` itself where it is a config file."""
    name = os.fspath(path)
    # An index of shards is JSON too: its config lies beside it.
    if name.endswith(".json") and not name.endswith(".index.json") and os.path.isfile(name):
        return name
    return locate_config(path, subfolder=subfolder, hub=hub)


def read_config_file(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a config file.

    Raises:
        ConfigError: the file is not there, is too large, is not JSON, or holds something other than an object.
        UnreadableFileError: the operating system refused.
    """
    text = _read(file)
    try:
        values = _decode_special_floats(json.loads(text))
    except (ValueError, RecursionError) as error:
        # ValueError is invalid JSON, invalid UTF-8, and a number of more digits than Python converts.
        raise ConfigError(
            "the config is not JSON",
            file=file,
            expected="a JSON object",
            found=str(error),
            fix="fetch or save the file again; a page of a web site or a Git LFS pointer is often found in its place",
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            "the config is JSON, but no object", file=file, expected="a JSON object", found=type(values).__name__
        )
    return values


def _read(file: str | os.PathLike[str]) -> bytes:
    try:
        with open(file, "rb") as opened:
            text = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError("there is no config", file=file, fix="check the path") from None
    except OSError as error:
        raise UnreadableFileError(
            "the config could not be read", file=file, found=error.strerror, fix="check the permissions of the file"
        ) from error
    if len(text) > MOST_BYTES:
        raise ConfigError("the config is too large to be one", file=file, expected=f"at most {MOST_BYTES:,} bytes")
    return text


def encode_special_floats(value: Any) -> Any:
    """``value`` with infinities and NaN written in the way other JSON readers take."""
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {_FLOAT_KEY: name}
    if isinstance(value, dict):
        return {key: encode_special_floats(held) for key, held in value.items()}
    if isinstance(value, list):
        return [encode_special_floats(held) for held in value]
    return value


def _decode_special_floats(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_FLOAT_KEY}:
            special = value[_FLOAT_KEY]
            return _SPECIAL_FLOATS.get(special, value) if isinstance(special, str) else value
        return {key: _decode_special_floats(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_decode_special_floats(held) for held in value]
    return value
