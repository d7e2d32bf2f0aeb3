"""The checkpoints that are measured: real shapes, random weights, made once and kept outside the repository."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["bert_base", "n_weight_bytes", "warm_up"]

_FORMATS = ("safetensors", "bin")
_BLOCK_BYTES = 16 << 20


def bert_base(file_format: str = "safetensors") -> Path:
    """A folder with BERT-base in fp32 (110 M parameters, 438 MB), as transformers builds it."""
    if file_format not in _FORMATS:
        raise ValueError(f"no such format: {file_format}")
    return _made_once(f"bert-base-{file_format}-1", lambda folder: _write_bert(folder, file_format))


def n_weight_bytes(folder: Path) -> int:
    """The size of the weight files in a folder."""
    return sum(path.stat().st_size for path in _weight_files(folder))


def warm_up(folder: Path) -> None:
    """Read the weight files once, so that the page cache has them."""
    for path in _weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK_BYTES):
                pass


def _weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _cache_folder() -> Path:
    given = os.environ.get("FASTLOAD_BENCH_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "fastload-bench"


def _made_once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name. It appears by a rename, so a half made one is never used.

    The name ends in the recipe's version: a changed recipe is a new folder.
    """
    done = _cache_folder() / name
    if done.is_dir():
        return done
    done.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=done.parent))
    try:
        write(draft)
        draft.chmod(0o755)
        draft.rename(done)
    except OSError:
        if not done.is_dir():  # else another process was first, and its folder is as good
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return done


def _write_bert(folder: Path, file_format: str) -> None:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    if file_format == "safetensors":
        model.save_pretrained(folder)
        return
    # transformers 5 writes no .bin any more: its config, and the state dict as it used to be saved.
    model.config.architectures = ["BertModel"]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
