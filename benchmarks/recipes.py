"""The merges that are measured, as moerge and as mergekit understand them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THIRD = 1 / 3


@dataclass(frozen=True)
class Target:
    """What the project promises: at most `floor` times the floor, at least `mergekit` times as fast as mergekit."""

    floor: float
    mergekit: float | None


@dataclass(frozen=True)
class Case:
    """One merge of three experts; `weights` are theirs, `moe` whether their FFNs stay separate."""

    target: Target
    merge: Mapping[str, Any]
    mergekit: Mapping[str, Any]
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    moe: bool = False

    def write_recipe(self, path: Path, models: Mapping[str, Path]) -> Path:
        """moerge's recipe (JSON is YAML)."""
        base, *experts = models
        recipe: dict[str, Any] = {
            "base": str(models[base]),
            "experts": {name: {"model": str(models[name]), "weight": w} for name, w in zip(experts, self.weights, strict=True)},
            "merge": dict(self.merge),
        }
        if self.moe:
            recipe["moe"] = {"separate": ["ffn"], "include_base": True, "top_k": 2, "router": {"kind": "random"}}
        return _write(path, recipe)

    def write_mergekit_config(self, path: Path, models: Mapping[str, Path], dtype: str = "bfloat16") -> Path:
        """mergekit's configuration; `dtype` is the type that mergekit computes in."""
        base, *experts = models
        if self.moe:
            members = [{"source_model": str(folder)} for folder in models.values()]
            return _write(
                path,
                {"base_model": str(models[base]), "experts": members, "experts_per_token": 2, **self.mergekit, "dtype": dtype},
            )
        density = {"density": self.merge["density"]} if "density" in self.merge else {}
        entries = [
            {"model": str(models[name]), "parameters": {"weight": weight, **density}}
            for name, weight in zip(experts, self.weights, strict=True)
        ]
        config = {"models": entries, **self.mergekit, "dtype": dtype, "out_dtype": "bfloat16"}
        if density:
            config["base_model"] = str(models[base])
        return _write(path, config)

    @property
    def mergekit_command(self) -> str:
        return "mergekit-moe" if self.moe else "mergekit-yaml"


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2))
    return path


_LINEAR = {"merge_method": "linear", "parameters": {"normalize": True}}
_SUM = {"normalize": False, "lambda": THIRD}

CASES: dict[str, Case] = {
    "average": Case(Target(1.5, 2), {"method": "average"}, _LINEAR),
    "linear": Case(Target(1.5, 2), {"method": "linear"}, _LINEAR, weights=(0.5, 0.3, 0.2)),
    "ties": Case(
        Target(2, 20),
        {"method": "ties", "density": 0.8, "scale": THIRD},
        {"merge_method": "ties", "parameters": _SUM},
    ),
    "dare": Case(
        Target(2, 6),
        {"method": "dare", "density": 0.8, "scale": THIRD},
        {"merge_method": "dare_linear", "parameters": _SUM},
    ),
    "moe": Case(Target(1.5, 2), {"method": "average"}, {"gate_mode": "random"}, moe=True),
}
