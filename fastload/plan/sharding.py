"""Which tensor goes into which shard, from nothing but names and sizes."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping

from fastload.errors import OptionError

__all__ = ["parse_size", "split_into_shards"]

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]+)\s*", re.ASCII)


def parse_size(size: int | str, option: str = "max_shard_size") -> int:
    """Bytes of a size: a number of bytes, or text such as ``"5GB"`` (5e9) or ``"5GiB"`` (5 * 2**30).

    Args:
        size: the size.
        option: its name in the caller's signature, for the message.

    Raises:
        OptionError: it is neither, or less than a byte.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        number, unit = match[1], _UNITS.get(match[2].upper())
        if unit is not None and (n_bytes := int(float(number) * unit)) > 0:
            return n_bytes
    raise OptionError(
        f"{option} is not a size",
        expected="a number of bytes above 0, or text such as '5GB' or '512MiB'",
        found=repr(size),
    )


def split_into_shards(
    sizes: Mapping[str, int], max_shard_bytes: int, together: Mapping[str, Hashable] | None = None
) -> list[list[str]]:
    """Divide keys into shards, greedily and in the order given, as huggingface_hub and transformers do.

    A tensor larger than a shard may be has one of its own, which stands before the shard that was being filled.

    Args:
        sizes: key -> bytes.
        max_shard_bytes: bytes that a shard of several tensors does not exceed.
        together: key -> group, for tensors that share memory: a group goes where its first key goes, and its
            other keys take no more room.

    Returns:
        The keys of each shard. There is one shard at least, which is empty if there are no keys.
    """
    followers: dict[Hashable, list[str]] = {}
    shards: list[list[str]] = []
    current: list[str] = []
    room = max_shard_bytes
    for key, n_bytes in sizes.items():
        group = (together or {}).get(key)
        if group is not None and group in followers:
            followers[group].append(key)
            continue
        if group is not None:
            followers[group] = []
        if n_bytes > max_shard_bytes:
            shards.append([key])
            continue
        if n_bytes > room:
            shards.append(current)
            current, room = [], max_shard_bytes
        current.append(key)
        room -= n_bytes
    if current or not shards:
        shards.append(current)
    if not followers:
        return shards
    return [
        shard + [key for first in shard for key in followers.get((together or {}).get(first), ())] for shard in shards
    ]
