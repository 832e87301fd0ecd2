"""A feed-forward module of any family for several experts at once: every matrix is a stack of theirs.

The module's own code runs on tokens that are sorted by expert, and each matrix takes the experts' tokens in turn. So whatever
the family computes between its matrices is computed by the family.

Shapes: E experts, K experts chosen per token, T tokens, S = T * K copies of tokens, D hidden size, I inputs, O outputs.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .versions_moerge import Conv1D

_GROUPED_BYTES = 16
"""Rows of torch's grouped product are multiples of this."""


class StackedLinear(nn.Module):
    """The matrices of all experts that a linear layer of one is replaced by; `counts` is the number of tokens of each."""

    def __init__(self, experts: int, dense: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.transposed = isinstance(dense, Conv1D)
        self.weight = nn.Parameter(torch.empty(experts, *dense.weight.shape, dtype=dense.weight.dtype))
        bias = getattr(dense, "bias", None)
        self.bias = nn.Parameter(torch.empty(experts, *bias.shape, dtype=bias.dtype)) if bias is not None else None
        self.counts: list[int] = [0] * experts

    def extra_repr(self) -> str:
        """Return the shape."""
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}"

    def forward(self, tokens: Tensor) -> Tensor:
        """Each expert's matrix times its tokens, which follow one another."""
        weight_EOI = self.weight.transpose(1, 2) if self.transposed else self.weight
        flat_SI = tokens.reshape(-1, tokens.shape[-1])
        if self._can_group(flat_SI):
            ends_E = torch.tensor(self.counts, device=flat_SI.device).cumsum(0).to(torch.int32)
            product_SO = F.grouped_mm(flat_SI, weight_EOI.transpose(1, 2), offs=ends_E)
            if self.bias is not None:
                counts_E = torch.tensor(self.counts, device=flat_SI.device)
                product_SO = product_SO + self.bias.repeat_interleave(counts_E, dim=0, output_size=len(flat_SI))
        else:
            parts = flat_SI.split(self.counts)
            biases = self.bias if self.bias is not None else [None] * len(parts)
            product_SO = torch.cat(
                [F.linear(part, matrix, bias) for part, matrix, bias in zip(parts, weight_EOI, biases, strict=True) if len(part)]
            )
        return product_SO.reshape(*tokens.shape[:-1], product_SO.shape[-1])

    def _can_group(self, tokens_SI: Tensor) -> bool:
        """Return whether torch's grouped product takes this: on a GPU, 16 bits an element, rows of whole 16 bytes."""
        rows = [size * self.weight.element_size() % _GROUPED_BYTES for size in self.weight.shape[1:]]
        fits = tokens_SI.is_cuda and self.weight.dtype is tokens_SI.dtype is torch.bfloat16 and not any(rows)
        return fits and hasattr(F, "grouped_mm")


class MoergeTopKRouter(nn.Module):
    """Chooses experts for each token, weighed by a softmax over the logits of those that were chosen."""

    def __init__(self, experts: int, hidden: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = experts, top_k
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, states_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], the weights of the chosen experts [T, K], and their numbers [T, K]."""
        logits_TE = F.linear(states_TD, self.weight)
        best_TK, chosen_TK = logits_TE.topk(self.top_k, dim=-1)
        return logits_TE, best_TK.softmax(-1, dtype=torch.float32).to(states_TD.dtype), chosen_TK


class RoutedFeedForward(nn.Module):
    """A feed-forward module whose tokens go to some of several experts, and with `shared_weight` to one that takes all."""

    def __init__(self, dense: nn.Module, experts: int, hidden: int, top_k: int, shared_weight: float | None) -> None:
        super().__init__()
        self.router = MoergeTopKRouter(experts, hidden, top_k)
        self.experts = _stacked(copy.deepcopy(dense), experts)
        self.shared = dense if shared_weight is not None else None
        self.shared_weight = shared_weight
        self._stacks = [module for module in self.experts.modules() if isinstance(module, StackedLinear)]

    def forward(self, states: Tensor, *others: Any, **named: Any) -> Tensor:
        """The sum of the chosen experts' outputs, each times its weight, in the shape of `states`."""
        states_TD = states.reshape(-1, states.shape[-1])
        _, weights_TK, chosen_TK = self.router(states_TD)
        order_S = chosen_TK.flatten().argsort(stable=True)
        counts = torch.bincount(chosen_TK.flatten(), minlength=self.router.num_experts).tolist()
        for stack in self._stacks:
            stack.counts = counts
        tokens_S = order_S // chosen_TK.shape[1]
        like_states = [_tokens(other, states, tokens_S) for other in others]
        found = self.experts(states_TD[tokens_S][None], *like_states, **named)
        weighed_SD = found[0] * weights_TK.flatten()[order_S, None]
        mixed_TD = torch.zeros_like(states_TD).index_add(0, tokens_S, weighed_SD.to(states_TD.dtype))
        mixed = mixed_TD.reshape(states.shape)
        if self.shared is None or self.shared_weight is None:
            return mixed
        apart: Tensor = self.shared(states, *others, **named)
        return (1 - self.shared_weight) * mixed + self.shared_weight * apart


def _tokens(other: Any, states: Tensor, tokens_S: Tensor) -> Any:
    """Another argument of a module for the tokens that it is given: what has the shape of the states is sorted as these are."""
    if isinstance(other, Tensor) and other.shape[:-1] == states.shape[:-1]:
        return other.reshape(-1, other.shape[-1])[tokens_S][None]
    return other


def _stacked(module: nn.Module, experts: int) -> nn.Module:
    """The module with stacks in the place of its matrices. ValueError for parameters of another kind."""
    if isinstance(module, nn.Linear | Conv1D):
        return StackedLinear(experts, module)
    own = next(iter(dict(module.named_parameters(recurse=False))), None)
    if own is not None:
        raise ValueError(
            f"a {type(module).__name__} in a feed-forward module has {own!r}, which is no matrix: it cannot be routed"
        )
    for name, child in module.named_children():
        setattr(module, name, _stacked(child, experts))
    return module
