"""Step 6: Expert Merging and Expert Merging++ against merges whose scale is tuned on the same texts."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moerge.learning.run import learn
from moerge.recipe import load_recipe

from .measuring import measure
from .rows import DENSE, Row, merged, recipe
from .settings import EXPERTS, Budget, Work
from .tables import best, tuned_scale

TOKENS = 256
EPOCHS = {5: 8, 10: 6, 50: 3}
LONGER = {"tokens": TOKENS, "heldout": 0.2, "gamma": 0.05, "learning_rate": 0.1, "patience": 10}
PUBLISHED = {"tokens": TOKENS, "heldout": 0.0, "gamma": 0.8}
"""As in the published code: one epoch at learning rate 0.5."""


def rows(texts: int, start: float, chunks: tuple[int, ...]) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
    """Names, the scale that learning starts from, and its settings."""
    longer = {**LONGER, "epochs": EPOCHS[texts], "texts": texts}
    yield "Expert Merging", start, longer
    yield "AdaMerging", start, {**longer, "objective": "entropy", "gamma": 0.0}
    for count in chunks:
        yield f"Expert Merging++, {count} a matrix", start, {**longer, "extra": count - 1.0}
    yield "Expert Merging, published settings", 0.1, {**PUBLISHED, "texts": texts}


def run(work: Work, budget: Budget, seed: int, save: Callable[[dict[str, Any]], None]) -> None:
    """The merges without learning first, then learning with few texts before many."""
    found: dict[str, Any] = {"documents": {}, "scales": {}, "learning": {}}
    for name, merge in DENSE.items():
        scales = found["scales"][name] = tuned_scale(work, budget, seed, name, merge)
        as_measured = f"dense: {name}, scale {best(scales):g}"
        checkpoint = merged(work, seed, as_measured, Row({**merge, "scale": best(scales)}))
        found["documents"][f"{name}, tuned scale"] = measure(work, budget, seed, as_measured, checkpoint)
        save(found)
    start = min(best(found["scales"]["task arithmetic"]), 0.95)  # a coefficient is a sigmoid, which never is 1
    for texts in budget.texts:
        for name, scale, settings in rows(texts, start, budget.chunks):
            full = f"{name}, {texts} texts"
            out, cost = _learned(work, budget, seed, full, scale, settings)
            found["learning"][full] = cost
            found["documents"][full] = measure(work, budget, seed, full, out)
            save(found)


def _learned(
    work: Work, budget: Budget, seed: int, name: str, scale: float, settings: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """The learned merge, and what it took: seconds, the process's peak memory, stages, mean coefficients."""
    import json

    out = work.made(seed, "learned", name)
    kept = out.with_suffix(".json")
    if not kept.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        asked = recipe(work, seed, Row({"method": "task_arithmetic", "scale": scale}))
        asked["calibration"] = {expert: str(work.text(expert, "calibration")) for expert in EXPERTS}
        begun = time.perf_counter()
        learning = {**settings, "seed": seed, "device": budget.device}
        result = learn(load_recipe({**asked, "learn": learning}), out, force=True)
        cost = {
            "seconds": time.perf_counter() - begun,
            "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "coefficients": result.coefficients.means(),
            "stages": [dict(stage) for stage in result.stages],
        }
        kept.write_text(json.dumps(cost) + "\n", encoding="utf-8")
    return out, json.loads(kept.read_text(encoding="utf-8"))
