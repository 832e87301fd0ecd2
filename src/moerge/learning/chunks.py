"""Expert Merging++: which tensors get more coefficients.

The paper's importance joins learned coefficients, task-vector magnitudes and parameter counts; its code takes the chunk counts
as given. Our rule: the importance of p is I_p = mean_k |c_kp| * ||tau_kp|| / sqrt(n_p), divided by the largest (the root mean
square of what each expert adds to an entry of p), and extra coefficients go one by one to the tensor whose importance per
coefficient is largest (d'Hondt's method). That makes the largest importance that one coefficient answers for as small as the
budget allows, gives the same result in any order, and leaves unimportant tensors with a single coefficient.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence


def importances(
    coefficients: Mapping[str, Sequence[float]], norms: Mapping[str, Sequence[float]], sizes: Mapping[str, int]
) -> dict[str, float]:
    """I_p in [0, 1] by name, from each expert's coefficient and its task vector's Frobenius norm."""
    unscaled = {
        name: sum(abs(c) * norm for c, norm in zip(coefficients[name], norms[name], strict=True))
        / (len(norms[name]) * math.sqrt(sizes[name]))
        for name in norms
    }
    largest = max(unscaled.values(), default=0.0)
    return {name: value / largest if largest else 0.0 for name, value in unscaled.items()}


def allocate(importance: Mapping[str, float], sizes: Mapping[str, int], extra: int) -> dict[str, int]:
    """The number of chunks of each tensor: one, and `extra` more shared out by importance; never more than it has entries."""
    counts = dict.fromkeys(importance, 1)
    order = {name: place for place, name in enumerate(importance)}
    waiting = [(-value / 2, order[name], name) for name, value in importance.items() if value > 0 and sizes[name] > 1]
    heapq.heapify(waiting)
    for _ in range(extra):
        if not waiting:
            break
        _, place, name = heapq.heappop(waiting)
        counts[name] += 1
        if counts[name] < sizes[name]:
            heapq.heappush(waiting, (-importance[name] / (counts[name] + 1), place, name))
    return counts
