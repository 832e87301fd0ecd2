"""Steps 0 and 1: the healed base and its experts, through `moerge tune` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moerge.tuning.run import tune

from .settings import MemoryBudget, Work

GENERAL = 0.2
"""The part of general text in an expert's training, as in the paper's table 5."""


def heal(base: Path, work: Work, budget: MemoryBudget) -> None:
    """Tune the model on general text: what damage four bits did is mended before an expert could gain by mending it."""
    data = {"general": {"path": str(work.text("general", f"train-{budget.seeds[0]}"))}}
    settings = _settings(budget, data, budget.healing_tokens, budget.learning_rate, budget.seeds[0])
    watched = {
        "heldout": {"general": str(work.text("general", "calibration"))},
        "heldout_sequences": 8,
        "evaluate_every": max(1, settings["steps"] // 2),
    }
    _train(base, work.base, {**settings, **watched})


def train_expert(work: Work, budget: MemoryBudget, seed: int, domain: str) -> None:
    """Continue the base's pretraining on one domain."""
    shares = {domain: 1 - GENERAL, "general": GENERAL}
    data = {name: {"path": str(work.text(name, f"train-{seed}")), "weight": share} for name, share in shares.items()}
    _train(work.base, work.expert(seed, domain), _settings(budget, data, budget.expert_tokens, 2 * budget.learning_rate, seed))


def _settings(budget: MemoryBudget, data: Mapping[str, Any], tokens: int, learning_rate: float, seed: int) -> dict[str, Any]:
    steps = round(tokens / (budget.batch * budget.length))
    return {
        "data": dict(data),
        "steps": steps,
        "batch": budget.batch,
        "length": budget.length,
        "learning_rate": learning_rate,
        "schedule": "cosine",
        "warmup": max(1, steps // 12),
        "dtype": budget.training_dtype,
        "device": budget.device,
        "seed": seed,
        "save_every": max(1, steps // 2),
    }


def _train(model: Path, out: Path, settings: Mapping[str, Any]) -> None:
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        tune({"model": str(model), **settings}, out, resume=True)
