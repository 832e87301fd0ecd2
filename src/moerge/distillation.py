"""Losses of learning and distillation. Shapes: T tokens, V vocabulary, H hidden, E experts, C chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moerge.files import atomic_path


@dataclass(frozen=True)
class DistillationTarget:
    """An expert's outputs on one of its texts: logits [T, V], or the largest with their ids, and chosen hidden states [T, H]."""

    logits: torch.Tensor
    ids: torch.Tensor | None
    hidden: tuple[torch.Tensor, ...]


def soft_cross_entropy(logits_TV: torch.Tensor, target: DistillationTarget, temperature: float) -> torch.Tensor:
    """CE(softmax(z_k / T), log_softmax(z / T)) * T^2, the mean over tokens in nats.

    Where only the expert's largest logits were kept, its probabilities are those among them.
    """
    log_TV = F.log_softmax(logits_TV / temperature, dim=-1)
    log_TM = log_TV if target.ids is None else log_TV.gather(-1, target.ids.long())
    probability_TM = F.softmax(target.logits.to(log_TM) / temperature, dim=-1)
    return -(probability_TM * log_TM).sum(-1).mean() * temperature**2


def hidden_distance(hidden: Sequence[torch.Tensor], target: DistillationTarget) -> torch.Tensor:
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


def drift_penalty(coef_logits: Iterable[torch.Tensor], initial: float) -> torch.Tensor:
    """mean |sigmoid(a) - initial| over all coefficients: what gamma weighs."""
    c = torch.cat([torch.sigmoid(a_EC).reshape(-1) for a_EC in coef_logits])
    return (c - initial).abs().mean()


@dataclass(frozen=True)
class TargetFiles:
    """A folder of safetensors files, one a text. `largest` is how many logits of each token are kept, None for all."""

    folder: Path
    layers: tuple[int, ...]
    largest: int | None

    def save(self, name: str, logits_TV: torch.Tensor, hidden: Sequence[torch.Tensor]) -> None:
        """Keep a text's targets, whole or not at all; `hidden` [T, H] belongs to `layers`."""
        kept = {f"hidden.{layer}": state_TH.contiguous().cpu() for layer, state_TH in zip(self.layers, hidden, strict=True)}
        if self.largest is None or self.largest >= logits_TV.shape[-1]:
            kept["logits"] = logits_TV.contiguous().cpu()
        else:
            top = logits_TV.topk(self.largest, dim=-1)
            kept |= {"logits": top.values.contiguous().cpu(), "ids": top.indices.int().contiguous().cpu()}
        with atomic_path(self.file(name)) as beside:
            save_file(kept, beside)

    def load(self, name: str) -> DistillationTarget:
        """Load the target of a text."""
        found = load_file(self.file(name))
        return DistillationTarget(found["logits"], found.get("ids"), tuple(found[f"hidden.{layer}"] for layer in self.layers))

    def file(self, name: str) -> Path:
        """Return the path of a text's targets."""
        return self.folder / f"{name}.safetensors"


def target_bytes(tokens: int, vocabulary: int, hidden: int, layers: int, largest: int | None, itemsize: int) -> int:
    """Bytes on disk for the targets of `tokens` tokens."""
    logits = vocabulary * itemsize if largest is None or largest >= vocabulary else largest * (itemsize + 4)
    return tokens * (logits + layers * hidden * itemsize)
