"""Experts that are low-rank adapters on one shared linear layer: W x + scale_i B_i (A_i x) (LoRA, Hu et al. 2022; Self-MoE).

Shapes: I inputs, O outputs, K rank. Which expert a shared module computes is said around its call, see `computing`.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters_moerge import adapted

_EXPERT: ContextVar[str] = ContextVar("expert", default="")


@contextmanager
def computing(expert: int) -> Iterator[None]:
    """Inside, adapted layers compute this expert."""
    before = _EXPERT.set(str(expert))
    try:
        yield
    finally:
        _EXPERT.reset(before)


class Adapter(nn.Module):
    """scale * B (A x), A [K, I] and B [O, K]; adds nothing until B is trained."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = scale
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum that is added to the shared layer's output."""
        return functional.linear(functional.linear(x, self.A), self.B) * self.scale


class AdaptedLinear(nn.Linear):
    """A linear layer that all experts share, and for some of them an adapter. `ranks` are (rank, scale) by expert."""

    def __init__(self, layer: nn.Linear, ranks: Mapping[int, tuple[int, float]]) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.adapters = nn.ModuleDict(
            {str(e): Adapter(layer.in_features, layer.out_features, *rank) for e, rank in sorted(ranks.items())}
        )

    def forward(self, x: Tensor) -> Tensor:
        """The output of the expert that is being computed; the shared layer's outside of `computing`."""
        out, expert = super().forward(x), _EXPERT.get()
        if expert in self.adapters:
            added: Tensor = self.adapters[expert](x)
            out = out + added
        return out

    def products(self, gradient_OI: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each adapter (expert, <tau, gradient>, <tau, tau>), tau = scale B A, which is not built."""
        for key, module in self.adapters.items():
            adapter: Any = module
            a_KI, b_OK = adapter.A.detach().float(), adapter.B.detach().float()
            b_grad_KI = b_OK.T @ gradient_OI.to(b_OK)
            square = ((b_OK.T @ b_OK) * (a_KI @ a_KI.T)).sum()
            yield int(key), adapter.scale * (b_grad_KI * a_KI).sum(), adapter.scale**2 * square


def adapt(layer: nn.Module, config: Any, layer_idx: int) -> None:
    """Give a decoder layer's linear layers the adapters that the configuration names."""
    ranks: dict[str, dict[int, tuple[int, float]]] = {}
    where = {"adapters": config.adapters, "expert_names": config.expert_names}
    for one in adapted(where | {"expert_config": {"num_hidden_layers": config.num_hidden_layers}}):
        if one.layer == layer_idx:
            ranks.setdefault(one.module, {})[one.expert] = (one.rank, one.scale)
    for module, by_expert in ranks.items():
        holder, _, name = module.partition(".")
        shared = getattr(layer, holder)[0]
        if not isinstance(getattr(shared, name, None), nn.Linear):
            raise ValueError(f"adapters name {module!r}, which is no linear layer of {type(shared).__name__}")
        setattr(shared, name, AdaptedLinear(getattr(shared, name), by_expert))
