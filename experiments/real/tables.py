"""Step 2: tables 1 and 3 in bits per byte of held-out text, the scales of dense merges tuned on calibration text."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import questions
from .measuring import bits, measure
from .rows import AVERAGE, DARE, DENSE, MIXTURES, SCALES, TIES, Row, alone, merged
from .settings import Budget, Work

Result = dict[str, Any]
Save = Callable[[Result], None]
ANSWERING = {
    "dense: average": Row(AVERAGE),
    "dense: TIES, scale 0.3333": Row(TIES),
    "dense: DARE, scale 0.3333": Row(DARE),
    **{name: MIXTURES[name] for name in ("BTX: average, random router", "TIES, ridge router")},
    **{name: row for name, row in MIXTURES.items() if "attention, PPL, top" in name},
}
"""Rows of tables 1 and 3 that are asked the benchmarks' questions."""


def run(work: Work, budget: Budget, seed: int, save: Save) -> None:
    """Measure row by row, and save after each."""
    found: Result = {"documents": {}, "scales": {}}
    for name, checkpoint in alone(work, seed).items():
        found["documents"][name] = measure(work, budget, seed, name, checkpoint)
        save(found)
    for name, row in _rows():
        found["documents"][name] = measure(work, budget, seed, name, merged(work, seed, name, row))
        save(found)
    for name, merge in DENSE.items():
        scales = found["scales"][name] = tuned_scale(work, budget, seed, name, merge)
        found["documents"][f"dense: {name}, tuned scale"] = found["documents"][f"dense: {name}, scale {best(scales):g}"]
        save(found)


def answers(work: Work, budget: Budget, seed: int, save: Save, bench: Path) -> None:
    """The benchmarks' reference solutions, for what the text has shown to matter."""
    found: Result = {"documents": {}}
    models = alone(work, seed) | {name: merged(work, seed, name, row) for name, row in ANSWERING.items()}
    for name, checkpoint in models.items():
        path = work.made(seed, "answers", name).with_suffix(".json")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(questions.measure(bench, budget, checkpoint)), encoding="utf-8")
        found["documents"][name] = json.loads(path.read_text(encoding="utf-8"))
        save(found)


def _rows() -> Iterator[tuple[str, Row]]:
    """The most telling rows first, since an hour of two cores is soon over."""
    yield "dense: average", Row(AVERAGE)
    yield from list(MIXTURES.items())[:4]
    for name, merge in DENSE.items():
        yield from ((f"dense: {name}, scale {scale:g}", Row({**merge, "scale": scale})) for scale in SCALES)
    yield from list(MIXTURES.items())[4:]


def tuned_scale(work: Work, budget: Budget, seed: int, name: str, merge: Mapping[str, Any]) -> dict[float, float]:
    """Mean bits per byte of the experts' domains on calibration text, by scale."""
    found = {}
    for scale in SCALES:
        checkpoint = merged(work, seed, f"{name}, scale {scale:g}", Row({**merge, "scale": scale}))
        measured = bits(measure(work, budget, seed, f"{name}, scale {scale:g}", checkpoint, "calibration"))
        found[scale] = statistics.fmean(measured[domain] for domain in measured if domain != "mean")
    return found


def best(by_scale: Mapping[float, float]) -> float:
    """The scale with the fewest bits per byte."""
    return min(by_scale, key=lambda scale: by_scale[scale])
