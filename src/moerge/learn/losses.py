"""What learning minimises. Shapes: T tokens, V vocabulary, H hidden, K experts, C chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Target:
    """What an expert makes of one of its texts: logits [T, V], or the largest with their ids, and chosen hidden states [T, H]."""

    logits: torch.Tensor
    ids: torch.Tensor | None
    hidden: tuple[torch.Tensor, ...]


def soft_cross_entropy(logits_TV: torch.Tensor, target: Target, temperature: float) -> torch.Tensor:
    """CE(softmax(z_k / T), log_softmax(z / T)) * T^2, the mean over tokens in nats.

    Where only the expert's largest logits were kept, its probabilities are those among them.
    """
    log_TV = F.log_softmax(logits_TV / temperature, dim=-1)
    log_TM = log_TV if target.ids is None else log_TV.gather(-1, target.ids.long())
    probability_TM = F.softmax(target.logits.to(log_TM) / temperature, dim=-1)
    return -(probability_TM * log_TM).sum(-1).mean() * temperature**2


def hidden_distance(hidden: Sequence[torch.Tensor], target: Target) -> torch.Tensor:
    """The mean squared difference of hidden states, mean over the chosen layers."""
    wide = torch.promote_types(hidden[0].dtype, torch.float32)
    distances = [
        F.mse_loss(mine.to(wide), theirs.to(mine.device, wide)) for mine, theirs in zip(hidden, target.hidden, strict=True)
    ]
    return torch.stack(distances).mean()


def entropy(logits_TV: torch.Tensor) -> torch.Tensor:
    """AdaMerging's objective: the entropy of the predictions, the mean over tokens in nats."""
    log_TV = F.log_softmax(logits_TV, dim=-1)
    return -(log_TV.exp() * log_TV).sum(-1).mean()


def departure(raw: Iterable[torch.Tensor], initial: float) -> torch.Tensor:
    """mean |sigmoid(a) - initial| over all coefficients: what gamma weighs."""
    c = torch.cat([torch.sigmoid(a_KC).reshape(-1) for a_KC in raw])
    return (c - initial).abs().mean()
