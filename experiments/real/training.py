"""Steps 0 and 1: the healed base and its experts, through `moerge tune` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moerge.tuning.run import tune

from .settings import Budget, Work

GENERAL = 0.2
"""The part of general text in an expert's training, as in the paper's table 5."""


def pretrained(model: Path, work: Work) -> Path:
    """The model's folder; a GGUF file is written as one, in bfloat16 and without what says that it is quantised."""
    folder = work.root / "pretrained"
    if model.suffix != ".gguf":
        return model
    if not folder.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        packed: Any = {"pretrained_model_name_or_path": model.parent, "gguf_file": model.name}
        read: Any = AutoModelForCausalLM.from_pretrained(**packed, dtype=torch.float32)
        entries = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
        plain: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**entries), dtype=torch.bfloat16)
        plain.load_state_dict(read.state_dict())
        AutoTokenizer.from_pretrained(**packed).save_pretrained(folder)
        plain.save_pretrained(folder)
    return folder


def heal(base: Path, work: Work, budget: Budget) -> None:
    """Tune the model on general text: what damage four bits did is mended before an expert could gain by mending it."""
    data = {"general": {"path": str(work.text("general", f"train-{budget.seeds[0]}"))}}
    settings = _settings(budget, data, budget.healing_tokens, budget.learning_rate, budget.seeds[0])
    watched = {
        "heldout": {"general": str(work.text("general", "calibration"))},
        "heldout_sequences": 8,
        "evaluate_every": max(1, settings["steps"] // 2),
    }
    _train(base, work.base, {**settings, **watched})


def train_expert(work: Work, budget: Budget, seed: int, domain: str) -> None:
    """Continue the base's pretraining on one domain."""
    shares = {domain: 1 - GENERAL, "general": GENERAL}
    data = {name: {"path": str(work.text(name, f"train-{seed}")), "weight": share} for name, share in shares.items()}
    _train(work.base, work.expert(seed, domain), _settings(budget, data, budget.expert_tokens, 2 * budget.learning_rate, seed))


def _settings(budget: Budget, data: Mapping[str, Any], tokens: int, learning_rate: float, seed: int) -> dict[str, Any]:
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
