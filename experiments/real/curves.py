"""Step 3: figure 10 and the claim of 60% less tuning, at the paper's learning rate and at ten times that."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moerge.tuning.metrics import read_metrics
from moerge.tuning.run import tune

from .rows import AVERAGE, MIXTURES, TIES, Row, merged, native
from .settings import DOMAINS, EXPERTS, OWN, Budget, Work
from .training import GENERAL

LEARNING_RATES = (1e-5, 1e-4)
BTX = "BTX: average"
BALANCED = {"load_balance": 0.01}


@dataclass(frozen=True)
class Curve:
    """A mixture and how it is tuned."""

    row: Row
    tuning: Mapping[str, Any] = field(default_factory=dict)
    distil: bool = False


CURVES = {
    BTX: Curve(native(AVERAGE, "random"), {"losses": BALANCED}),
    "TIES, ridge": Curve(native(TIES, "ridge"), {"losses": BALANCED}),
    "separate attention, PPL": Curve(MIXTURES["separate attention, PPL, top 2"]),
    "TIES": Curve(native(TIES, "random"), {"losses": BALANCED}),
    "TIES, ridge, distilled": Curve(
        native(TIES, "ridge"), {"losses": {**BALANCED, "distillation": {"weight": 1.0}}}, distil=True
    ),
    "router only": Curve(native(AVERAGE, "random"), {"losses": BALANCED, "train": "router"}),
}


def weights() -> dict[str, float]:
    """What base and experts together were trained on, as in the last column of the paper's table 5."""
    general = (1 + len(EXPERTS) * GENERAL) / (1 + len(EXPERTS))
    return {"general": general, **dict.fromkeys(EXPERTS, (1 - general) / len(EXPERTS))}


def run(work: Work, budget: Budget, seed: int, save: Callable[[dict[str, Any]], None]) -> None:
    """Tune every mixture at both rates on the same sequences in the same order."""
    found: dict[str, Any] = {}
    for learning_rate in LEARNING_RATES:
        curves = found.setdefault(f"{learning_rate:g}", {})
        for name, curve in CURVES.items():
            curves[name] = points(work, budget, seed, name, curve, learning_rate)
            save({"curves": found})


def points(work: Work, budget: Budget, seed: int, name: str, curve: Curve, learning_rate: float) -> list[tuple[int, float]]:
    """Tokens tuned, and the geometric mean of the domains' perplexities on held-out text."""
    mixture = merged(work, seed, f"for curves {name}", curve.row)
    out = work.made(seed, "tuned", f"{name} {learning_rate:g} {budget.curve_tokens}")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        tune({"model": str(mixture), **settings(work, budget, seed, curve, learning_rate)}, out, resume=True)
    entries = [entry for entry in read_metrics(out / "metrics.jsonl") if "heldout" in entry]
    return [(entry["tokens"], math.exp(statistics.fmean(entry["heldout"].values()))) for entry in entries]


def settings(work: Work, budget: Budget, seed: int, curve: Curve, learning_rate: float) -> dict[str, Any]:
    """How a mixture is tuned."""
    steps = max(1, round(budget.curve_tokens / (budget.batch * budget.length)))
    data: dict[str, dict[str, Any]] = {}
    for domain, weight in weights().items():
        data[domain] = {"path": str(work.text(domain, f"train-{seed}")), "weight": weight}
        if curve.distil:
            data[domain]["teacher"] = str(work.base if OWN[domain] == "base" else work.expert(seed, domain))
    return {
        "data": data,
        "steps": steps,
        "batch": budget.batch,
        "length": budget.length,
        "learning_rate": learning_rate,
        "warmup": steps // 10,
        "dtype": budget.mixture_dtype,
        "device": budget.device,
        "seed": seed,
        "save_every": max(1, steps // 2),
        "heldout": {domain: str(work.text(domain, "valid")) for domain in DOMAINS},
        "heldout_sequences": budget.heldout // 2,
        "evaluate_every": max(1, steps // budget.curve_points),
        **curve.tuning,
    }
