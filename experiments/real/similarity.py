"""Step 4: figures 4 to 9 and table 2: how alike the experts are, and whom texts and questions are sent to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moerge.comparison import compare, write_comparison
from moerge.inference.routes import route

from .questions import write_prompts
from .rows import MIXTURES, TIES, Row, merged, recipe
from .settings import Budget, Work

ROUTED = (
    "separate attention, PPL, top 2",
    "separate attention, task vector",
    "BTX: average, random router",
    "TIES, random router",
    "DARE, random router",
    "average, ridge router",
    "TIES, ridge router",
    "DARE, ridge router",
)
"""Figure 9 and table 2 are of the first two, figures 5 and 7 of the others."""


def run(work: Work, budget: Budget, seed: int, save: Callable[[dict[str, Any]], None], bench: Path, results: Path) -> None:
    """Compare once, then route mixture by mixture."""
    folder = work.made(seed, "similarity", "TIES")
    compared = compare(recipe(work, seed, Row(TIES)))
    write_comparison(compared, folder)
    for kind in ("png", "svg"):
        shutil.copyfile(folder / f"pairs.{kind}", results / f"figure-4-seed-{seed}.{kind}")
    found = compared.to_json()
    kept = {"advice": found["advice"], "verdicts": found["verdicts"], "routing": {}}
    kept["layers"] = [pair for pair in found["pairs"] if pair["scope"] == "layer"]
    save(kept)
    prompts = write_prompts(bench, work.root / "prompts", budget.routed)
    for name in ROUTED:
        checkpoint = merged(work, seed, name, MIXTURES[name])
        routes = route(checkpoint, {**work.texts("valid"), **prompts}, limit=budget.routed, oracle=False)
        kept["experts"] = list(routes.experts)
        kept["routing"][name] = {text.name: list(text.alpha_E) for text in routes.texts}
        save(kept)
