"""Step 2: tables 1 and 3 in bits per byte of held-out text, the scales of dense merges tuned on calibration text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .measuring import Documents, bits, measure
from .rows import AVERAGE, DENSE, MIXTURES, SCALES, Row, alone, merged
from .settings import MemoryBudget, Work

Result = dict[str, Any]
Save = Callable[[Result], None]


def run(work: Work, budget: MemoryBudget, seed: int, save: Save) -> None:
    """Measure row by row, and save after each, since an hour of two cores is soon over."""
    found: Result = {"documents": {}, "scales": {}}
    for name, documents in _alone(work, budget, seed):
        found["documents"][name] = documents
        save(found)
    for name, row in _rows(work, budget, seed, found["scales"]):
        found["documents"][name] = measure(work, budget, seed, name, merged(work, seed, name, row))
        save(found)


def _alone(work: Work, budget: MemoryBudget, seed: int) -> Iterator[tuple[str, Documents]]:
    for name, checkpoint in alone(work, seed).items():
        yield name, measure(work, budget, seed, name, checkpoint)


def _rows(work: Work, budget: MemoryBudget, seed: int, scales: Result) -> Iterator[tuple[str, Row]]:
    """Untuned merges and mixtures first: a tuned scale costs as many runs as there are scales."""
    yield "dense: average", Row(AVERAGE)
    mixtures = iter(MIXTURES.items())
    for _, (name, row) in zip(range(4), mixtures, strict=False):
        yield name, row
    for name, merge in DENSE.items():
        scales[name] = tuned_scale(work, budget, seed, name, merge)
        yield f"dense: {name}, tuned scale", Row({**merge, "scale": best(scales[name])})
        yield from ((f"dense: {name}, scale {scale:g}", Row({**merge, "scale": scale})) for scale in SCALES)
    yield from mixtures


def tuned_scale(work: Work, budget: MemoryBudget, seed: int, name: str, merge: Mapping[str, Any]) -> dict[float, float]:
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
