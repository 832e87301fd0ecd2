"""Maps between the width of the shared embedding and head and that of an expert."""

# mypy: allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Projector(nn.Module):
    """`linear(x) + down(gelu(up(x)))`: the linear part is what is fitted; without it the projector is the paper's MLP.

    gelu is the exact one, x times the normal distribution's cumulative function of x.
    """

    def __init__(self, inputs: int, outputs: int, width: int, *, linear: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs) if linear else None
        self.up = nn.Linear(inputs, width)
        self.down = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """From [..., inputs] to [..., outputs]."""
        out: Tensor = self.down(functional.gelu(self.up(x)))
        return out if self.linear is None else out + self.linear(x)


def draw_as_torch(module: nn.Linear) -> None:
    """Draw weight and bias uniformly within 1 / sqrt(inputs), as nn.Linear does; what is loaded stays."""
    bound = module.in_features**-0.5
    with torch.no_grad():
        for parameter in (module.weight, module.bias):
            if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
                parameter.uniform_(-bound, bound)
