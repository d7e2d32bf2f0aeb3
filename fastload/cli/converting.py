"""``fastload convert``: the same tensors in another format, other shards, another dtype."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastload.checkpoint import Checkpoint
from fastload.cli.arguments import Where
from fastload.cli.neighbours import copy_files, find_neighbours
from fastload.cli.output import print_json, print_line
from fastload.cli.scratch import convert_into_scratch
from fastload.dtypes import DType
from fastload.errors import ConfigError
from fastload.models.config_file import encode_special_floats, find_config_file, read_config_file
from fastload.progress import Progress
from fastload.saver import SaveReport, save_checkpoint
from fastload.sources.names import CONFIG_NAME
from fastload.storage.atomic import write_text

if TYPE_CHECKING:
    import torch

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Write the checkpoint to ``out``, with the small files that lie around it, and say what was written."""
    where = Where.of(arguments)
    files = where.locate(in_chunks=True)
    if arguments.to == "dcp":
        from fastload.distributed.dcp import prepare_folder

        prepare_folder(arguments.out)
    checkpoint = Checkpoint(files)
    config = _config_text(where, arguments.dtype)
    neighbours = find_neighbours(files, arguments.out, whole_folder=not os.path.isfile(where.path))
    tensors = dict(convert_into_scratch(checkpoint, arguments.dtype, arguments.out))
    tensors |= {dropped: tensors[kept] for dropped, kept in checkpoint.aliases.items()}
    extra_files = {} if config is None else {CONFIG_NAME: config}
    with Progress("writing", sum(tensor.nbytes for tensor in tensors.values())) as progress:
        if arguments.to == "dcp":
            saved = _save_for_ranks(tensors, arguments.out, extra_files, progress.advance)
        else:
            saved = save_checkpoint(
                tensors,
                arguments.out,
                max_shard_size=arguments.max_shard_size,
                safe_serialization=arguments.to == "safetensors",
                variant=where.files.variant,
                extra_files=extra_files,
                tied=checkpoint.aliases,
                metadata=_metadata(checkpoint) if arguments.to == "safetensors" else None,
                progress=progress.advance,
            )
    copied = copy_files(neighbours.small, files.folder, arguments.out)
    if arguments.json:
        print_json({"source": where.path, **asdict(saved), "copied": copied, "left_out": neighbours.left_out})
        return 0
    print_line(str(saved))
    for title, names in {"wrote": saved.files, "copied": copied, "left out": neighbours.left_out}.items():
        for name in names:
            print_line(f"  {title:<9} {name}")
    return 0


def _save_for_ranks(
    tensors: Mapping[str, torch.Tensor], folder: str, extra_files: Mapping[str, str], progress: Callable[[int], None]
) -> SaveReport:
    """Write a folder of torch.distributed.checkpoint."""
    from fastload.distributed.dcp import write_folder

    start = time.perf_counter()
    for name, text in extra_files.items():
        write_text(os.path.join(folder, name), text)
    files = (*write_folder(tensors, folder, progress), *extra_files)
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return SaveReport(folder, files, len(tensors), n_bytes, time.perf_counter() - start, removed=())


def _config_text(where: Where, dtype: DType | None) -> str | None:
    """The checkpoint's config.json, saying the dtype that the weights will have; None where there is no config."""
    try:
        file = find_config_file(where.path, subfolder=where.files.subfolder, hub=where.hub)
    except ConfigError:
        return None
    values = read_config_file(file)
    if dtype is not None:
        values = _with_dtype(values, dtype)
    return json.dumps(encode_special_floats(values), indent=2, ensure_ascii=False) + "\n"


def _with_dtype(values: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """The fields of a config with its dtype, and those of the configs in it, changed."""
    changed = {
        name: _with_dtype(value, dtype)
        if isinstance(value, dict) and name.endswith("_config") and name != "quantization_config"
        else value
        for name, value in values.items()
    }
    names = [name for name in ("dtype", "torch_dtype") if isinstance(values.get(name), str)]
    # A config that says nothing of its own dtype is read as float32, or follows the one it is part of.
    if not names and "model_type" in values:
        names = ["dtype"]
    return {**changed, **dict.fromkeys(names, dtype.torch_name)}


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the files' headers say beside their format and the names of tied tensors, which the saver writes itself."""
    return {
        name: text for name, text in checkpoint.metadata.items() if name != "format" and name not in checkpoint.aliases
    }
