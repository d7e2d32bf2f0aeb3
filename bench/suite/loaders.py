"""The ways to get BERT-base out of a folder, each as its own documentation recommends it.

A loader takes the folder and returns a whole model in eval mode. Its imports happen on the first call: whoever times a
loader calls it once before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["BERT_LOADERS", "Loader"]


@dataclass(frozen=True)
class Loader:
    """One way to load, and the format of the files that it loads.

    ``load`` takes the folder and, as an option, the dtype to convert to. ``needs`` is the optional package that it is.
    ``complete`` has what is still to come of a model in place.
    """

    file_format: str
    load: Callable[..., Any]
    needs: str = ""
    complete: Callable[[Any], None] = lambda model: None


def _fastload(folder: Path, dtype: torch.dtype | None = None) -> Any:
    from fastload import BertModel

    return BertModel.from_pretrained(folder, dtype=dtype or "auto")


def _fastload_hf(folder: Path, dtype: torch.dtype | None = None) -> Any:
    from fastload.hf import AutoModel

    return AutoModel.from_pretrained(folder, dtype=dtype or "auto")


def _transformers(folder: Path, dtype: torch.dtype | None = None) -> Any:
    from transformers import BertModel

    return BertModel.from_pretrained(folder, dtype=dtype or "auto")


def _safetensors(folder: Path, dtype: torch.dtype | None = None) -> Any:
    from safetensors.torch import load_file

    return _by_hand(folder, load_file(folder / "model.safetensors"), dtype)


def _torch_load(folder: Path, dtype: torch.dtype | None = None) -> Any:
    import torch

    state = torch.load(folder / "pytorch_model.bin", mmap=True, weights_only=True)
    return _by_hand(folder, state, dtype)


def _by_hand(folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype | None) -> Any:
    """transformers' module, built on meta, given the tensors by ``load_state_dict(assign=True)``.

    What someone writes who wants to load faster than transformers without another library. The two buffers that no
    file has are made by hand, since meta construction leaves them without values.
    """
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = BertModel(config)
    model.load_state_dict(state, assign=True)
    positions = torch.arange(config.max_position_embeddings).expand((1, -1))
    model.embeddings.position_ids = positions
    model.embeddings.token_type_ids = torch.zeros_like(positions)
    return model.to(dtype).eval() if dtype else model.eval()


BERT_LOADERS = {
    "fastload": Loader("safetensors", _fastload),
    "fastload.hf": Loader("safetensors", _fastload_hf),
    "transformers": Loader("safetensors", _transformers),
    "safetensors": Loader("safetensors", _safetensors),
    "fastload .bin": Loader("bin", _fastload),
    "transformers .bin": Loader("bin", _transformers),
    "torch.load(mmap)": Loader("bin", _torch_load),
}
