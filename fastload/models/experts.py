"""Mixtures of experts: a router chooses a few of many feed forward blocks for each token.

The experts of a layer are two parameters, one expert after the other. Files hold every projection of every expert by
itself; they are fused by the plan of a load, and separated again, as views, by a save.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastload.models.decoder_config import DecoderConfig
from fastload.models.decoder_traits import ExpertNames
from fastload.models.initialisation import Rules, normal
from fastload.models.layers import activation
from fastload.plan.fusing import Concatenate, Fusion, Stack

if TYPE_CHECKING:
    from fastload.models.decoder_outputs import Record

__all__ = ["MixtureOfExperts", "balance_loss", "expert_fusions", "expert_initialisers", "separated"]


class Router(nn.Module):
    """Chooses experts for every token."""

    def __init__(self, config: DecoderConfig, names: ExpertNames) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.n_chosen = config.num_experts_per_tok
        self.is_exact = names.always_normalised
        self.is_normalised = names.always_normalised or config.norm_topk_prob

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For (tokens, hidden size): the logits (tokens, experts), and the chosen ones' numbers and weights."""
        logits = F.linear(states, self.weight)
        weights, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(self.n_chosen, dim=-1)
        if self.is_normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, chosen, weights if self.is_exact else weights.to(logits.dtype)


class Experts(nn.Module):
    """All experts of a layer. Only those that are chosen are read.

    Attributes:
        gate_up_proj: (experts, 2 * inner size, hidden size), the gate before the other.
        down_proj: (experts, hidden size, inner size).
        here: numbers of the experts that this process has. Results of others count as zero: of a model that is split
            over ranks, the sums of all ranks are added up.
    """

    def __init__(self, config: DecoderConfig, names: ExpertNames) -> None:
        super().__init__()
        self.n_experts, size, inner = config.num_local_experts, config.hidden_size, getattr(config, names.size_field)
        self.gate_up_proj = nn.Parameter(torch.empty(self.n_experts, 2 * inner, size))
        self.down_proj = nn.Parameter(torch.empty(self.n_experts, size, inner))
        self.act_fn = activation(config.hidden_act)
        self.here = range(self.n_experts)

    def forward(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' results.

        Args:
            states: (tokens, hidden size).
            chosen, weights: (tokens, chosen experts).
        """
        n_tokens, n_chosen = chosen.shape
        if n_tokens == 1:
            results = torch.cat([self._expert(number, states) for number in chosen[0].tolist()])
        else:
            # Each expert gets its tokens together; the results go back to the order of the tokens.
            numbers = chosen.flatten()
            order = numbers.argsort(stable=True)
            n_tokens_of = numbers.bincount(minlength=self.n_experts).tolist()
            parts = torch.split(states[order // n_chosen], n_tokens_of)
            results = torch.cat([self._expert(number, part) for number, part in enumerate(parts) if len(part)])
            results = results[order.argsort()]
        weighted = results * weights.reshape(-1, 1)
        # Summed in one step, which rounds once; adding up in a short type would round for every expert.
        mixed = weighted.view(n_tokens, n_chosen, -1).sum(dim=1).to(states.dtype)
        if len(self.here) < self.n_experts and torch.is_grad_enabled():
            # All ranks take part in the sums of the backward pass, also those whose experts nobody chose.
            for held in (states, _here(self.gate_up_proj), _here(self.down_proj)):
                mixed = mixed + held[:0].sum()
        return mixed

    def _expert(self, number: int, states: Tensor) -> Tensor:
        if number not in self.here:
            return torch.zeros_like(states)
        own = number - self.here.start
        gate, up = F.linear(states, _here(self.gate_up_proj)[own]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, _here(self.down_proj)[own])


def _here(parameter: Tensor) -> Tensor:
    """What this process has of a parameter: of a DTensor its part, of others all."""
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()


class MixtureOfExperts(nn.Module):
    """The feed forward block of a layer with experts."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        names = type(config).traits.experts
        assert names is not None, "asked of a family without experts"
        self.gate = Router(config, names)
        self.experts = Experts(config, names)
        self.noise: float = getattr(config, "router_jitter_noise", 0.0)

    def forward(self, hidden_states: Tensor, record: Record | None) -> Tensor:
        if self.training and self.noise > 0:
            low, high = 1.0 - self.noise, 1.0 + self.noise
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(low, high)
        states = hidden_states.flatten(0, 1)
        logits, chosen, weights = self.gate(states)
        if record is not None and record.router_logits is not None:
            record.router_logits.append(logits)
        mixed: Tensor = self.experts(states, chosen, weights)
        return mixed.view(hidden_states.shape)


expert_initialisers: Rules = {
    Router: {"weight": normal},
    Experts: {"gate_up_proj": normal, "down_proj": normal},
}


def expert_fusions(names: ExpertNames) -> tuple[Fusion, ...]:
    """How the tensors in a family's files become the two parameters of a layer's experts."""
    return (
        Fusion(
            (f"experts.*.{names.gate}.weight", f"experts.*.{names.up}.weight"),
            "experts.gate_up_proj",
            (Stack(0), Concatenate(1)),
        ),
        Fusion((f"experts.*.{names.down}.weight",), "experts.down_proj", (Stack(0),)),
    )


def separated(tensors: Mapping[str, Tensor], names: ExpertNames) -> dict[str, Tensor]:
    """A model's tensors under the names, and in the pieces, that the family's files have; the pieces are views."""
    found: dict[str, Tensor] = {}
    for fqn, tensor in tensors.items():
        key = fqn.replace(".mlp.", f".{names.block}.")
        prefix, _, parameter = key.rpartition(".experts.")
        if prefix and parameter == "gate_up_proj":
            gates, ups = tensor.chunk(2, dim=1)
            found |= _numbered(prefix, {names.gate: gates, names.up: ups})
        elif prefix and parameter == "down_proj":
            found |= _numbered(prefix, {names.down: tensor})
        else:
            found[key] = tensor
    return found


def _numbered(prefix: str, stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    experts = zip(*(stack.unbind() for stack in stacks.values()), strict=True)
    return {
        f"{prefix}.experts.{number}.{name}.weight": tensor
        for number, parts in enumerate(experts)
        for name, tensor in zip(stacks, parts, strict=True)
    }


def balance_loss(router_logits: Iterable[Tensor], n_chosen: int, attention_mask: Tensor | None) -> Tensor | None:
    """How unevenly experts are used (Switch Transformer, https://arxiv.org/abs/2101.03961, equations 4 to 6).

    Args:
        router_logits: (batch * tokens, experts) of every layer that has experts.
        n_chosen: experts for a token.
        attention_mask: (batch, tokens), 0 for padding, which does not count.

    Returns:
        The loss, smallest where all experts are used alike; None where no layer has any.
    """
    logits = list(router_logits)
    if not logits:
        return None
    joined = torch.cat([layer.to(logits[0].device) for layer in logits])
    shares = joined.softmax(dim=-1)
    chosen = F.one_hot(shares.topk(n_chosen, dim=-1).indices, joined.shape[-1]).sum(dim=1).float()
    counted = torch.ones(len(joined), 1, device=joined.device)
    if attention_mask is not None:
        counted = attention_mask.to(joined.device).reshape(-1, 1).repeat(len(logits), 1).float()
    used, expected = ((held.float() * counted).sum(dim=0) / counted.sum() for held in (chosen, shares))
    return (used * expected).sum() * joined.shape[-1]
