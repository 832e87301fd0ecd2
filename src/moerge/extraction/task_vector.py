"""Task vectors in memory, and their size."""

from __future__ import annotations

import numpy as np

from moerge.tensors.source import Source
from moerge.tensors.streams import WINDOW, Stream


def task_vector(base: Source, expert: Source) -> np.ndarray:
    """expert - base [N] in float32, with no second copy of either."""
    of_base, of_expert = Stream(base, digested=False), Stream(expert, digested=False)
    values_N = np.empty(expert.tensor.size, np.float32)
    base_N = np.empty(min(WINDOW, values_N.size), np.float32)
    for start in range(0, values_N.size, WINDOW):
        part_N = values_N[start : start + WINDOW]
        of_base.fill_finite(base_N[: part_N.size])
        of_expert.fill_finite(part_N, base_N[: part_N.size])
    return values_N


def squares(values: np.ndarray) -> float:
    """The sum of squares in float64."""
    flat_N = values.reshape(-1)
    parts = (flat_N[start : start + WINDOW] for start in range(0, flat_N.size, WINDOW))
    return float(sum(np.square(part_N, dtype=np.float64).sum() for part_N in parts))
