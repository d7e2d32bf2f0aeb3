"""What each command takes."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

import fastload
from fastload import dtypes
from fastload.dtypes import DType
from fastload.errors import OptionError
from fastload.options import FileOptions, HubOptions
from fastload.plan.sharding import parse_size
from fastload.sources.local import CheckpointFiles
from fastload.sources.resolve import locate_checkpoint

__all__ = ["Where", "build_parser"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """The checkpoint that a command is about.

    Attributes:
        path: folder, weights file, index or hub id.
        files: which of a folder's files are meant.
        hub: how a hub is asked.
    """

    path: str
    files: FileOptions
    hub: HubOptions

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Where:
        """What the arguments say."""
        return cls(
            path=arguments.checkpoint,
            files=FileOptions(
                variant=arguments.variant, subfolder=arguments.subfolder, use_safetensors=arguments.use_safetensors
            ),
            hub=HubOptions(revision=arguments.revision),
        )

    def locate(self, *, in_chunks: bool = False) -> CheckpointFiles:
        """Find the files.

        Args:
            in_chunks: accept folders of torch.distributed.checkpoint; OptionError for them otherwise.
        """
        files = locate_checkpoint(self.path, self.files, self.hub)
        if files.format == "dcp" and not in_chunks:
            raise OptionError(
                "this command does not read folders of torch.distributed.checkpoint",
                file=files.folder,
                expected="safetensors or .bin files",
                found=os.path.basename(files.index or files.folder),
                fix="convert it first: 'fastload convert DIR OUT'",
            )
        return files

    @property
    def keywords(self) -> dict[str, Any]:
        """The same as keywords of ``from_pretrained``."""
        return {
            "variant": self.files.variant,
            "subfolder": self.files.subfolder,
            "use_safetensors": self.files.use_safetensors,
            "revision": self.hub.revision,
        }


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. What it returns names the module of the command in ``module``."""
    parser = argparse.ArgumentParser(
        prog="fastload", description="Look into Hugging Face checkpoints, load, convert, verify and time them."
    )
    parser.add_argument("--version", action="version", version=f"fastload {fastload.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_inspect(commands)
    _add_plan(commands)
    _add_load(commands)
    _add_convert(commands)
    _add_verify(commands)
    _add_diff(commands)
    _add_bench(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = _add_command(commands, "inspect", "inspecting", "what is in a checkpoint; reads headers only")
    parser.add_argument("--all", action="store_true", help="every tensor in a row of its own")
    _add_json(parser)


def _add_plan(commands: Any) -> None:
    parser = _add_command(commands, "plan", "planning", "what a load would do, and why; reads no weights")
    parser.add_argument("--all", action="store_true", help="also the tensors, one a row")
    parser.add_argument(
        "--ranks", metavar="N", type=_count, help="what each of N ranks would read, the model laid out over all of them"
    )
    parser.add_argument(
        "--tp", metavar="N", type=_count, default=1, help="ranks that split every layer (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks-per-node", metavar="N", type=_count, default=8, help="for what a node reads (default: %(default)s)"
    )
    _add_dtype(parser)
    _add_json(parser)


def _add_load(commands: Any) -> None:
    parser = _add_command(commands, "load", "loading", "load a checkpoint and print the report")
    _add_dtype(parser)
    _add_json(parser)


def _add_convert(commands: Any) -> None:
    parser = _add_command(
        commands, "convert", "converting", "write a checkpoint in another format, other shards, another dtype"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write to; may be the checkpoint's own")
    parser.add_argument(
        "--to",
        choices=("safetensors", "bin", "dcp"),
        default="safetensors",
        help="format to write; dcp is a folder of torch.distributed.checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=_size,
        default="5GB",
        help="most bytes of a file, such as 500MB or 2GiB (default: %(default)s); dcp has one file",
    )
    _add_dtype(parser)
    _add_json(parser)


def _add_verify(commands: Any) -> None:
    parser = _add_command(
        commands, "verify", "verifying", "read every byte of a checkpoint and say whether it is whole"
    )
    _add_json(parser)


def _add_diff(commands: Any) -> None:
    parser = _add_command(
        commands, "diff", "diffing", "compare two checkpoints tensor by tensor, whatever their formats and shards"
    )
    parser.add_argument("other", metavar="OTHER", type=_not_empty, help="the checkpoint to compare with")
    _add_json(parser)


def _add_bench(commands: Any) -> None:
    parser = _add_command(
        commands,
        "bench",
        "benching",
        "load and run a model in fresh processes, beside transformers; print what it took",
    )
    parser.add_argument(
        "--rounds", metavar="N", type=_count, default=3, help="processes of each kind; medians count (default: 3)"
    )
    parser.add_argument(
        "--tokens", metavar="N", type=_count, default=16, help="tokens of the input (default: %(default)s)"
    )
    parser.add_argument("--no-cold", dest="cold", action="store_false", help="only with the files in the page cache")
    _add_dtype(parser)
    _add_json(parser)


def _add_command(commands: Any, name: str, module: str, purpose: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=purpose, description=purpose[0].upper() + purpose[1:] + "."
    )
    parser.set_defaults(module=f"fastload.cli.{module}")
    parser.add_argument(
        "checkpoint", metavar="DIR", type=_not_empty, help="a checkpoint's folder, a weights file, an index or a hub id"
    )
    parser.add_argument("--variant", help="the fp16 of model.fp16.safetensors")
    parser.add_argument("--subfolder", default="", help="folder below DIR that holds config and weights")
    parser.add_argument(
        "--use-safetensors",
        action=argparse.BooleanOptionalAction,
        help="safetensors only, or .bin only (default: safetensors if there are any)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", type=_float_type, help="type for floating point tensors, such as bf16 (default: as they are)"
    )


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.fspath(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except OptionError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GiB") from None


def _float_type(name: str) -> DType:
    try:
        found = dtypes.from_name(name)
    except OptionError:
        found = None
    if found is None or not found.castable:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of float32, float16, bfloat16 and float64")
    return found
