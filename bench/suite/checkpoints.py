"""The checkpoints that are measured: real shapes, random weights, made once and kept outside the repository."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.streamers import tensorizer_write

if TYPE_CHECKING:
    import torch

__all__ = [
    "bert_base",
    "cache_folder",
    "llama_1b",
    "llama_8b",
    "moe",
    "n_weight_bytes",
    "small_tensors",
    "warm_up",
    "weight_files",
]

_FORMATS = ("safetensors", "bin", "tensors")
_BLOCK_BYTES = 16 << 20
# Primes: how many values the largest checkpoint repeats, and how far each of its tensors is from the one before.
_N_DRAWN = 33_554_393
_SHIFT = 1_000_003
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.tensors")


def bert_base(file_format: str = "safetensors") -> Path:
    """A folder with BERT-base in fp32 (110 M parameters, 438 MB), as transformers builds it."""
    return _made_once(f"bert-base-{_known(file_format)}-1", lambda folder: _write_bert(folder, file_format))


def llama_1b(file_format: str = "safetensors", *, tiny: bool = False) -> Path:
    """A folder with a Llama of 1.1 B parameters in bf16 (2.2 GB, 201 tensors) in one file.

    Tiny, it has one narrow layer: a load of it brings all imports along, and no weights.
    """
    name = f"llama-{'tiny' if tiny else '1b'}-{_known(file_format)}-1"
    return _made_once(name, lambda folder: _write_llama(folder, file_format, tiny))


def llama_8b() -> Path:
    """A folder with a model of Llama 3 8B's shapes in bf16: 8.0 B parameters, 16 GB in shards of one layer each."""
    return _made_once("llama-8b-1", _write_llama_8b)


def moe(file_format: str = "safetensors", *, tiny: bool = False) -> Path:
    """A folder with a Qwen3-MoE of 24 layers x 128 experts in bf16 (2.5 GB): 9,435 tensors in three shards."""
    if file_format != "safetensors":
        raise ValueError(f"no such format of this model: {file_format}")
    return _made_once(f"qwen3-moe{'-tiny' * tiny}-1", lambda folder: _write_moe(folder, tiny))


def small_tensors(count: int, file_format: str = "safetensors") -> Path:
    """A folder with ``count`` fp32 tensors of 1 KB in one file, named as those of blocks are."""
    name = f"small-{count}-{_known(file_format)}-1"
    return _made_once(name, lambda folder: _write_small(folder, count, file_format))


def n_weight_bytes(folder: Path) -> int:
    """The size of the weight files in a folder."""
    return sum(path.stat().st_size for path in weight_files(folder))


def warm_up(folder: Path) -> None:
    """Read the weight files once, so that the page cache has them."""
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK_BYTES):
                pass


def weight_files(folder: Path) -> list[Path]:
    """The files in a folder that hold tensors."""
    return sorted(path for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern))


def cache_folder() -> Path:
    """Where checkpoints are kept, and where saves are tried."""
    given = os.environ.get("FASTLOAD_BENCH_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "fastload-bench"


def _known(file_format: str) -> str:
    if file_format not in _FORMATS:
        raise ValueError(f"no such format: {file_format}")
    return file_format


def _made_once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name. It appears by a rename, so a half made one is never used.

    The name ends in the recipe's version: a changed recipe is a new folder.
    """
    done = cache_folder() / name
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
    _save_model(BertModel(BertConfig()).eval(), folder, file_format)


def _write_llama(folder: Path, file_format: str, tiny: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=256 if tiny else 2048,
        intermediate_size=512 if tiny else 5632,
        num_hidden_layers=1 if tiny else 22,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    _save_model(_in_bfloat16(LlamaForCausalLM, config), folder, file_format)


def _write_llama_8b(folder: Path) -> None:
    """Written layer by layer: the model itself may not fit into memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for key in shapes:
        shards.setdefault(".".join(key.split(".")[:3]), []).append(key)
    # Drawing eight billion numbers takes minutes; a prime length keeps the rows of a matrix different.
    torch.manual_seed(0)
    values = (torch.randn(_N_DRAWN) * config.initializer_range).bfloat16()
    files = {}
    for number, keys in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for key in keys:
            n_values = shapes[key].numel()
            drawn = values.roll(len(files) * _SHIFT).repeat(-(-n_values // _N_DRAWN))[:n_values].view(shapes[key])
            tensors[key] = torch.ones_like(drawn) if "norm" in key else drawn
            files[key] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes.values()))}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_moe(folder: Path, tiny: bool) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=1 if tiny else 24,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8 if tiny else 128,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
        dtype="bfloat16",
    )
    _in_bfloat16(Qwen3MoeForCausalLM, config).save_pretrained(folder, max_shard_size="1GB")


def _in_bfloat16(model_class: Any, config: Any) -> Any:
    """A model with random weights that was bf16 from the start, so that memory holds it once."""
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return model_class(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def _save_model(model: Any, folder: Path, file_format: str) -> None:
    if file_format == "safetensors":
        model.save_pretrained(folder)
        return
    # transformers 5 writes no .bin any more: its config, and the state dict as it used to be saved.
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if file_format == "tensors":
        tensorizer_write(model, folder / "model.tensors")
        return
    _save_tensors(model.state_dict(), folder, file_format)


def _write_small(folder: Path, count: int, file_format: str) -> None:
    import torch

    torch.manual_seed(0)
    values = torch.randn(count, 256)
    tensors = {f"model.layers.{n // 100}.block.{n % 100}.weight": values[n].clone() for n in range(count)}
    _save_tensors(tensors, folder, file_format)


def _save_tensors(tensors: dict[str, torch.Tensor], folder: Path, file_format: str) -> None:
    import torch
    from safetensors.torch import save_file

    if file_format == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
