"""Small real models in blocks of several pages, and what a model in the middle of arriving looks like."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

WIDTH = 64
INNER = 256
N_BLOCKS = 6
# Of one block: two matrices and what is small.
BLOCK_BYTES = 4 * (2 * WIDTH * INNER + INNER + 3 * WIDTH)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """What any model is: something before its blocks, the blocks, something behind them; two kinds of buffer."""

    def __init__(self, n_blocks: int = N_BLOCKS, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(n_blocks))
        self.register_buffer("scale", torch.full((WIDTH,), 2.0))
        self.register_buffer("shift", torch.full((WIDTH,), 0.5, device="cpu"), persistent=False)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale + self.shift.to(x.dtype))


TOKENS = torch.arange(12).reshape(2, 6)


def on_meta(**options: Any) -> Stack:
    with torch.device("meta"):
        return Stack(**options)


def write_stack(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Stack:
    """Write a stack with random weights to a file; returns the model that was written."""
    torch.manual_seed(0)
    model = Stack(**options).to(dtype).eval()
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, path, {"format": "pt"})
    return model


def output(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        result: Any = model(tokens)
    found: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
    return found


def names_on_meta(model: nn.Module) -> set[str]:
    """Parameters and buffers that have no memory."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name for name, tensor in tensors.items() if tensor.is_meta}


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def descriptors_of(path: Path) -> int:
    """Descriptors that this process has open for a file or for what is in a folder."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(path))
    return found


def mappings_of(path: Path) -> int:
    """Mappings of a file, or of what is in a folder, in this process."""
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())
