"""The learning loop: AdamW on the coefficients alone, texts of all experts in turn, the best update kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moerge.distillation import drift_penalty, entropy, hidden_distance, soft_cross_entropy
from moerge.errors import InputError
from moerge.learning.expert_targets import ExpertTargets, Sample
from moerge.learning.model import MergingModel
from moerge.recipe.learning import Learning

_RESTART, _GROWTH, _FLOOR = 50, 2, 0.1
"""Cosine warm restarts as published: the first period in updates, its growth, and the lowest learning rate's fraction."""


@dataclass
class History:
    """The history of learning, by update: losses in nats a token, and the update that was kept."""

    rows: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    stopped_early: bool = False


@dataclass
class Trainer:
    """Learns `coef_logits` (a [E, C] by key) in place. `tell` is called after each text; errors name the recipe `source`."""

    model: MergingModel
    coef_logits: Mapping[str, torch.Tensor]
    settings: Learning
    initial: float
    targets: ExpertTargets
    task_weights: Mapping[int, float]
    source: str = "recipe"
    tell: Callable[[], None] = lambda: None

    def fit(self, train: Sequence[Sample], heldout: Sequence[Sample]) -> History:
        """One or more epochs; with `heldout` the coefficients of the best update stay, counting the initial ones.

        Raises InputError if a loss or its gradient is NaN or infinite.
        """
        settings, history = self.settings, History()
        if math.isinf(settings.gamma) or not train:
            return history
        parameters = list(self.coef_logits.values())
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        floor = settings.learning_rate * _FLOOR
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=_RESTART, T_mult=_GROWTH, eta_min=floor)
        best, kept = self._evaluate(heldout, history, 0), self._copy()
        order = [sample for _ in range(settings.epochs) for sample in train]
        groups = [order[start : start + settings.accumulation] for start in range(0, len(order), settings.accumulation)]
        looks, since = set(evaluations(len(groups), len(heldout), settings.accumulation)), 0
        for update, group in enumerate(groups, 1):
            self._update(group, optimizer, history, update)
            schedule.step()
            if update not in looks:
                continue
            now, since = self._evaluate(heldout, history, update), since + 1
            if now < best or not heldout:
                best, kept, history.best, since = now, self._copy(), update, 0
            elif settings.patience and since >= settings.patience:
                history.stopped_early = True
                break
        for key, values in kept.items():
            self.coef_logits[key].data.copy_(values)
        return history

    def _update(self, group: Sequence[Sample], optimizer: Any, history: History, update: int) -> None:
        total = 0.0
        for sample in group:
            objective = self.objective(sample) + self.settings.gamma * drift_penalty(self.coef_logits.values(), self.initial)
            (objective / len(group)).backward()  # type: ignore[no-untyped-call]
            total += objective.item() / len(group)
            self.tell()
        norm = torch.nn.utils.clip_grad_norm_(list(self.coef_logits.values()), self.settings.clip)
        self._check(f"the loss in update {update}", total)
        self._check(f"the gradient's norm in update {update}", norm.item())
        optimizer.step()
        optimizer.zero_grad()
        history.rows.append({"update": update, "train": total, "learning_rate": optimizer.param_groups[0]["lr"]})

    def _evaluate(self, heldout: Sequence[Sample], history: History, update: int) -> float:
        """The objective on the held-out texts; infinity if there are none."""
        if not heldout:
            return math.inf
        losses = []
        with torch.no_grad():
            for sample in heldout:
                losses.append(self.objective(sample).item())
                self.tell()
            found = (
                sum(losses) / len(losses) + self.settings.gamma * drift_penalty(self.coef_logits.values(), self.initial).item()
            )
        self._check("the objective on the held-out texts" + (f" after update {update}" if update else ""), found)
        if update == 0:
            history.rows.append({"update": 0})
        history.rows[-1]["heldout"] = found
        return found

    def _check(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise InputError(
                f"{self.source}: learn: {what} is {value}, from which nothing can be learned: bring temperature, gamma, "
                "hidden_weight, task_weights and learning_rate nearer to their defaults"
            )

    def objective(self, sample: Sample) -> torch.Tensor:
        """The loss of one text without the regulariser."""
        settings, output = self.settings, self.model.forward(sample.inputs, sample.task)
        logits_TV = output.logits[0]
        logits_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
        if settings.objective == "entropy":
            loss = entropy(logits_TV)
        else:
            target = self.targets.of(sample)
            loss = soft_cross_entropy(logits_TV, target, settings.temperature)
            if settings.hidden_weight:
                hidden = [output.hidden_states[layer][0] for layer in self.targets.layers]
                loss = loss + settings.hidden_weight * hidden_distance(hidden, target)
        return self.task_weights.get(sample.task, 1.0) * loss

    def _copy(self) -> dict[str, torch.Tensor]:
        return {key: a_EC.detach().clone() for key, a_EC in self.coef_logits.items()}


def evaluations(updates: int, heldout: int, accumulation: int) -> list[int]:
    """After which updates the held-out texts run: never more of them than of the texts trained on, and after the last."""
    every = max(1, math.ceil(heldout / accumulation))
    return sorted({*range(every, updates + 1, every), updates})


def interleave(by_task: Mapping[int, Sequence[Any]]) -> list[Any]:
    """Texts of all tasks in turn; those of a task with fewer come again, so that tasks count alike (as published)."""
    rounds = max((len(texts) for texts in by_task.values()), default=0)
    return [texts[turn % len(texts)] for turn in range(rounds) for texts in by_task.values() if texts]
