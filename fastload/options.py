"""What a caller can ask for, checked where it is asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from fastload import dtypes
from fastload.dtypes import DType
from fastload.errors import OptionError

if TYPE_CHECKING:
    import torch

__all__ = ["PINNED_BYTES", "Durability", "FileOptions", "HubOptions", "LoadOptions", "parse_durability"]

PINNED_BYTES = 256 << 20
"""Pinned host memory for each accelerator of a load, unless the caller says otherwise."""

Durability: TypeAlias = Literal["none", "data", "full"]
"""What a save waits for, so that it outlives a power failure (a kill it outlives in any case).

    none    nothing: the operating system writes when it likes
    data    every file is on the disk before it takes the place of an older one
    full    also the folder, so that the names are there too when the save returns
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """How a model hub is asked for files. Handed to huggingface_hub unchanged.

    Attributes:
        revision: branch, tag or commit; None for the default branch.
        token: access token; None for the one that was logged in with, False for none.
        cache_dir: folder of the download cache; None for huggingface_hub's own.
        local_files_only: use what is cached and never the network.
        force_download: fetch again even what is cached.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """Which of a folder's files are the checkpoint.

    Attributes:
        variant: the ``fp16`` of ``model.fp16.safetensors``; None for the plain names.
        subfolder: folder below the checkpoint's that holds config and weights.
        use_safetensors: True for safetensors only, False for .bin only, None for safetensors first.
    """

    variant: str | None = None
    subfolder: str = ""
    use_safetensors: bool | None = None

    def __post_init__(self) -> None:
        if self.variant is not None and (not self.variant or set(self.variant) & set("/\\")):
            raise OptionError("not the name of a variant", expected="a name such as 'fp16'", found=repr(self.variant))
        parts = os.path.normpath(self.subfolder).split(os.sep)
        if os.path.isabs(self.subfolder) or ".." in parts:
            raise OptionError(
                "a subfolder lies below the checkpoint's folder",
                expected="a relative path without '..'",
                found=repr(self.subfolder),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How weights are placed into a module.

    Attributes:
        dtype: type that floating point tensors are converted to; None to keep each one's own. Integer, boolean,
            complex and 8-bit float tensors always keep theirs.
        device_map: module name -> device; ``""`` is the whole model. The longest name that fits decides.
        is_dispatched: give the module hooks that take inputs from one device of the map to the next, and bring what is
            on the CPU beside an accelerator there for each forward. Then no module of the map holds another one.
        strict: raise on any missing, unexpected or mismatched key.
        ignore_mismatched_sizes: initialise parameters whose shape differs from the file's instead of raising.
        key_mapping: regular expression -> replacement, applied to the file's keys in order before all else.
        detached: leave no tensor on a mapped file.
        lazy: bring a block's weights when it is first used.
        stream: bring them in the background, in the order of use, while the caller goes on.
        memory_budget_bytes: most bytes of weights that are kept in memory; the others are read for each forward.
        pinned_bytes: most pinned host memory that a load to an accelerator takes, for each of them.
        dedup: "node" to have the ranks of a machine read for each other; None for each to read for itself.
    """

    dtype: DType | None = None
    device_map: Mapping[str, str] = field(default_factory=lambda: {"": "cpu"})
    is_dispatched: bool = False
    strict: bool = False
    ignore_mismatched_sizes: bool = False
    key_mapping: Mapping[str, str] | None = None
    detached: bool = False
    lazy: bool = False
    stream: bool = False
    memory_budget_bytes: int | None = None
    pinned_bytes: int = PINNED_BYTES
    dedup: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and not self.dtype.castable:
            raise OptionError(
                "weights are converted to floating point types only",
                expected="float32, float16, bfloat16 or float64",
                found=self.dtype.torch_name,
            )
        ways = {"lazy": self.lazy, "stream": self.stream, "memory_budget": self.memory_budget_bytes is not None}
        chosen = [way for way, is_chosen in ways.items() if is_chosen]
        if len(chosen) > 1 or (chosen and self.detached):
            found = ", ".join([*chosen, *(["detached"] if self.detached else [])])
            raise OptionError("these options exclude each other", found=found, fix="choose one of them")
        if self.is_dispatched:
            self._check_dispatched()
        if self.dedup not in (None, "node"):
            raise OptionError("not a way to share reading", key="dedup", expected="None or 'node'", found=self.dedup)
        if self.dedup is not None and chosen:
            raise OptionError("what ranks read for each other cannot arrive later", key="dedup", found=chosen[0])

    def _check_dispatched(self) -> None:
        others = {
            "memory_budget": self.memory_budget_bytes is not None,
            "dedup": self.dedup is not None,
            # What passes to an accelerator stays in the files.
            "detached": self.detached and "cpu" in self.device_map.values(),
        }
        for name, is_given in others.items():
            if is_given:
                raise OptionError(
                    "a device map of several devices excludes this option",
                    key=name,
                    expected="one device in device_map",
                    found=", ".join(sorted(set(self.device_map.values()))),
                    fix=f"leave out {name}, or name one device",
                )

    @property
    def is_deferred(self) -> bool:
        """Whether weights arrive after the load has returned."""
        return self.lazy or self.stream


def parse_dtype(dtype: str | torch.dtype | None) -> DType | None:
    """The DType that a caller's ``dtype=`` means; None stays None."""
    if dtype is None:
        return None
    if isinstance(dtype, str):
        return dtypes.from_name(dtype)
    return dtypes.from_torch(dtype)


def parse_durability(durability: str) -> Durability:
    """The value, if it is one. Raises OptionError."""
    for known in get_args(Durability):
        if durability == known:
            return known  # type: ignore[no-any-return]
    raise OptionError("not a durability", key="durability", expected="'none', 'data' or 'full'", found=repr(durability))


def reject_unknown(caller: str, unknown: Mapping[str, Any]) -> None:
    """Raise TypeError as Python does for a keyword that nothing takes; a misspelt option must not pass in silence."""
    if unknown:
        names = ", ".join(repr(name) for name in sorted(unknown))
        raise TypeError(
            f"{caller}() got an unexpected keyword argument: {names} (no option, and no field of the config)"
        )
