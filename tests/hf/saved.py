"""Small models of transformers, and the whole content of the checkpoints that they are saved as."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from tests.conftest import same_bytes

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
T5_SIZES = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 100}


def bert() -> Any:
    """Its head is tied to the embeddings."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def t5() -> Any:
    """Three names for the embeddings."""
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SIZES))


def moe() -> Any:
    """Fused experts, which are one tensor an expert and projection in the files."""
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "moe_intermediate_size": 16}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **sizes))


def mixtral() -> Any:
    """Fused experts, under other names in the files."""
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def llava() -> Any:
    """A model whose names in the files begin otherwise."""
    text = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    vision = transformers.CLIPVisionConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=8)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=99)
    return transformers.LlavaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "bert": bert,
    "llava": llava,
    "mixtral": mixtral,
    "moe": moe,
    "t5": t5,
}


def made(name: str, dtype: torch.dtype | None = None) -> Any:
    """One of the models, the same values each time."""
    torch.manual_seed(0)
    model = MODELS[name]()
    return model if dtype is None else model.to(dtype)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder: tensors and metadata of safetensors and .bin files, JSON, text; no checksums."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found[path.name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                found[f"metadata of {path.name}"] = _without_checksums(file.metadata())
        elif path.suffix == ".bin":
            found[path.name] = torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
            if ".index." in path.name:
                found[path.name]["metadata"] = _without_checksums(found[path.name]["metadata"])
        else:
            found[path.name] = path.read_bytes()
    return found


def _without_checksums(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: text for name, text in metadata.items() if name != "fastload.checksums"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for name, content in contents(folder).items():
        if name.endswith((".safetensors", ".bin")) and not name.startswith("metadata of "):
            assert tensors.keys().isdisjoint(content)
            tensors |= content
    return tensors


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [key for key, tensor in expected.items() if not same_bytes(found[key], tensor)]
    assert different == []


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """The same files, with the same tensors, metadata and text in each."""
    ours, stock = contents(found), contents(expected)
    assert list(ours) == list(stock)
    for name, content in stock.items():
        if name.endswith((".safetensors", ".bin")) and not name.startswith("metadata of "):
            assert_same_tensors(ours[name], content)
        else:
            assert ours[name] == content, name


def assert_same_model(found: Any, expected: Any) -> None:
    """The same class, config, and bytes of every parameter and buffer."""
    assert type(found) is type(expected)
    ours, stock = found.config.to_dict(), expected.config.to_dict()
    assert {k: v for k, v in ours.items() if k != "_name_or_path"} == {
        k: v for k, v in stock.items() if k != "_name_or_path"
    }
    assert_same_tensors(
        dict(found.named_parameters(remove_duplicate=False)), dict(expected.named_parameters(remove_duplicate=False))
    )
    assert_same_tensors(
        dict(found.named_buffers(remove_duplicate=False)), dict(expected.named_buffers(remove_duplicate=False))
    )
