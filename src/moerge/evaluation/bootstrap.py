"""Errors of figures that are measured on a sample of documents. Shapes: N documents, R resamples.

Documents are what is drawn, not tokens: tokens of one document are not independent, and resampling them would give errors that
are too small (Efron and Tibshirani, 1993, An Introduction to the Bootstrap, chapters 6, 8 and 13).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
"""Of all intervals."""
_COUNTS = 4_000_000
"""Counts that are in memory at a time."""
_NORMAL = 1.959963984540054
"""The normal distribution's quantile at (1 + LEVEL) / 2."""

Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error and an interval at `LEVEL`, both None where fewer than two documents say nothing about it."""

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None


def bootstrap(statistic: Callable[[Array], Array], values_NC: Array, *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """A function of column sums over documents: the estimate from all of them, its error from documents drawn with replacement.

    `statistic` maps sums [..., C] to figures [...]. The error is the standard deviation over the resamples, the interval their
    percentiles. The same seed draws the same documents for any values, so that two models are compared on the same ones.
    """
    values_NC = np.asarray(values_NC, np.float64)
    count = len(values_NC)
    value = float(statistic(values_NC.sum(0)))
    if count < 2:
        return Estimate(value)
    found_R = np.concatenate([statistic(counts_RN @ values_NC) for counts_RN in _draws(count, seed, resamples)])
    low, high = np.quantile(found_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(found_R.std(ddof=1)), float(low), float(high))


def _draws(count: int, seed: int, resamples: int) -> Iterator[Array]:
    """Draw the number of times that each document counts, [R, N], in blocks that fit into memory."""
    rng = np.random.default_rng(seed)
    block = max(1, _COUNTS // count)
    share_N = np.full(count, 1 / count)
    for start in range(0, resamples, block):
        yield rng.multinomial(count, share_N, size=min(block, resamples - start)).astype(np.float64)


def accuracy(correct: Sequence[bool]) -> Estimate:
    """The share of right answers: its standard error, and Wilson's interval (1927), which holds for shares near 0 and 1 too."""
    count, share = len(correct), sum(correct) / len(correct)
    if count < 2:
        return Estimate(share)
    z2 = _NORMAL**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Estimate(share, math.sqrt(share * (1 - share) / (count - 1)), max(0.0, centre - half), min(1.0, centre + half))
