"""Tiny mixtures of every native family, text for them, and reductions of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.helpers.hf_models import FAMILIES, random_model, save

NATIVE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe")
_COUNT = {"mixtral": "num_local_experts", "granitemoe": "num_local_experts"}
EXPERTS = 6


def make(folder: Path, family: str = "mixtral", *, seed: int = 1, experts: int = EXPERTS, **config: Any) -> Path:
    """A random mixture with a tokenizer."""
    count = _COUNT.get(family, "num_experts")
    save(random_model(FAMILIES[family](**{count: experts, **config}), seed), folder)
    return folder


def documents(seed: int, count: int = 5, words: int = 24) -> list[str]:
    """Texts of the words of the tiny tokenizer."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{number}" for number in rng.integers(3, 64, words)) for _ in range(count)]


def write_texts(folder: Path) -> dict[str, str]:
    """Text of two domains; their files by name, as a recipe has them."""
    found = {}
    for seed, domain in enumerate(("math", "code")):
        path = folder / f"{domain}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in documents(seed)), encoding="utf-8")
        found[domain] = path.name
    return found


def recipe(folder: Path, model: str = "model", name: str = "reduce.yaml", *, text: bool = True, **settings: Any) -> Path:
    """A recipe beside the mixture, with `reduce` of these settings."""
    calibration = {"calibration": write_texts(folder)} if text else {}
    path = folder / name
    written = {"model": model, "reduce": {"experts": 4, **settings}, **calibration}
    path.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    return path
