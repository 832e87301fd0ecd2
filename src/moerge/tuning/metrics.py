"""Metrics of each step, as a line of JSON; and experts that are dying. Shapes: L routed layers, E experts."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moerge.files import atomic_path

WINDOW = 20
"""Steps over which the load of an expert is averaged before it counts as dying."""


class Metrics:
    """A JSONL that only grows; `begin` drops what was written after the step that training continues from."""

    def __init__(self, file: Path, dying: float, note: Callable[[str], None]) -> None:
        self.file, self._note = file, note
        self.watch = DyingExperts(dying)
        self.last: dict[str, Any] = {}

    def begin(self, step: int) -> None:
        """Training continues after this step, or begins with its first."""
        rows = [row for row in read_metrics(self.file) if row["step"] <= step] if step and self.file.exists() else []
        with atomic_path(self.file) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for row in rows:
            self.watch.see(row.get("load"))
            self.last = row

    def add(self, row: Mapping[str, Any]) -> None:
        """A step's row; says aloud what is dying."""
        newly = self.watch.see(row.get("load"))
        self.last = {**row, **({"dying": self.watch.dying} if row.get("load") is not None else {})}
        for layer, expert, share, even in newly:
            where = f"expert {expert} of layer {layer}" if len(row["load"]) > 1 else f"expert {expert}"
            self._note(
                f"step {row['step']}: {where} is dying: {share:.2%} of the choices in the last {WINDOW} steps, an even share "
                f"is {even:.0%}; raise losses.load_balance"
            )
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.last) + "\n")


class DyingExperts:
    """Experts whose mean load over the last `WINDOW` steps is below `fraction` of an even share."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._loads: deque[np.ndarray] = deque(maxlen=WINDOW)
        self.dying: list[list[int]] = []

    def see(self, load_LE: Sequence[Sequence[float]] | None) -> list[tuple[int, int, float, float]]:
        """A step's load; who begins to die with it, as (layer, expert, mean load, even share)."""
        if load_LE is None:
            return []
        self._loads.append(np.array(load_LE, np.float64))
        if len(self._loads) < WINDOW:
            return []
        mean_LE = np.mean(self._loads, axis=0)
        even = 1 / mean_LE.shape[1]
        before, self.dying = self.dying, np.argwhere(mean_LE < self._fraction * even).tolist()
        return [(layer, e, float(mean_LE[layer, e]), even) for layer, e in self.dying if [layer, e] not in before]


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was being written when the process died is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def not_finite(row: Mapping[str, Any]) -> str | None:
    """The first figure of a row that is NaN or infinite."""
    return next((key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)), None)
