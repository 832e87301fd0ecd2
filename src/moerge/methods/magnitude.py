"""Exact magnitude thresholds without sorting.

|tau| as a float32 has 31 bits; their order as an integer is its order as a number. Two histograms find the threshold: a first
pass counts the upper 15 bits, which gives its bin, a second the lower 16 inside that bin. Of a large tensor a sample gives a
bracket; then one pass counts what lies above it and collects the little that lies inside, which settles it, or shows that the
sample misled. Either way the result is exact.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from moerge.methods.jit import STRIP, kernel
from moerge.methods.method import Measurement, Statistic

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_LOW_BITS = np.uint32(16)
_LOW_MASK = np.uint32(0xFFFF)
_LARGE, _HUGE = 1 << 20, 1 << 30
"""Sizes between which a sample pays: below, a histogram is cheap; above, what a bracket collects would be large."""
_RUNS = 16
_MARGIN = 0.005
"""Half a bracket's width as a fraction of all entries: six standard errors of a sample of 2^18 independent entries."""


def kept_count(density: float, size: int) -> int:
    """How many of `size` entries a density keeps: ceil(density * size), since (1 - density) * size is rounded down to drop.

    The density counts as the decimal number that was written: 0.8 of 10 entries is 8, never 9.
    """
    return math.ceil(Fraction(str(density)) * size)


def magnitude_thresholds(density: float, experts: int, size: int) -> Measurement:
    """Passes that find, for each expert, the magnitude of its `kept_count`-th largest entry, as float32 [K].

    Entries that equal the threshold are all kept, as in the original TIES, so that which ones does not depend on order.
    """
    kept = kept_count(density, size)
    if kept == size:
        return np.zeros(experts, np.float32)
    thresholds = None
    if _LARGE <= size <= _HUGE:
        thresholds = yield from _from_bracket(kept, experts, size)
    if thresholds is None:
        thresholds = yield from _from_histograms(kept, experts)
    return thresholds.astype(np.uint32).view(np.float32)


def _from_bracket(kept: int, experts: int, size: int) -> Generator[Statistic, Any, np.ndarray | None]:
    """Thresholds as bits [K]; None where a sample misjudged them."""
    sample: _Collected = yield Statistic(partial(_Collected, experts), _collect_all, runs=_RUNS)
    brackets_K2 = np.array([_bracket(values, kept / size) for values in sample.values()], np.uint32)
    found: _Collected = yield Statistic(partial(_Collected, experts), partial(_collect_inside, brackets_K2))
    bits_K = np.empty(experts, np.int64)
    for k, inside in enumerate(found.values()):
        above, from_high, from_low = (int(count) for count in found.counts_K3[k])
        if above < kept <= from_high:
            bits_K[k] = brackets_K2[k, 1]
        elif from_high < kept <= from_high + len(inside):
            bits_K[k] = _select(inside, kept - from_high)
        elif from_high + len(inside) < kept <= from_low:
            bits_K[k] = brackets_K2[k, 0]
        else:
            return None
    return bits_K


def _bracket(sample_N: np.ndarray, density: float) -> tuple[int, int]:
    """Two of a sample's magnitudes, as bits, between which the whole tensor's threshold most likely lies."""
    low, high = (np.clip(round(len(sample_N) * (density + side * _MARGIN)), 1, len(sample_N)) for side in (1, -1))
    return _select(sample_N, low), _select(sample_N, high)


def _select(bits_N: np.ndarray, rank: int) -> int:
    """The rank-th largest of magnitudes' bits; like the two passes, on what is in memory."""
    coarse_KB, fine_KB = np.zeros((1, 1 << 15), np.int64), np.zeros((1, 1 << 16), np.int64)
    values_KN = bits_N.view(np.float32)[None]
    _count_high(values_KN, coarse_KB)
    bin_K, rank_K = _locate(coarse_KB, np.array([rank]))
    _count_low(values_KN, bin_K.astype(np.uint32), fine_KB)
    return int(bin_K[0]) << 16 | int(_locate(fine_KB, rank_K)[0][0])


def _from_histograms(kept: int, experts: int) -> Generator[Statistic, Any, np.ndarray]:
    """Thresholds as bits [K]."""
    coarse_KB = yield Statistic(partial(np.zeros, (experts, 1 << 15), np.int64), _count_high)
    bins_K, ranks_K = _locate(coarse_KB, np.full(experts, kept))
    fine_KB = yield Statistic(partial(np.zeros, (experts, 1 << 16), np.int64), partial(_count_low_in, bins_K.astype(np.uint32)))
    low_K, _ = _locate(fine_KB, ranks_K)
    bits_K: np.ndarray = (bins_K << 16) | low_K
    return bits_K


class _Collected:
    """Bits of magnitudes by expert, and the number [K, 3] of those above `high`, from `high` and from `low` of a bracket."""

    def __init__(self, experts: int) -> None:
        self.counts_K3 = np.zeros((experts, 3), np.int64)
        self.pieces: list[list[np.ndarray]] = [[] for _ in range(experts)]
        self.room = np.empty(16 * STRIP, np.uint32)

    def __iadd__(self, other: _Collected) -> _Collected:
        self.counts_K3 += other.counts_K3
        for mine, theirs in zip(self.pieces, other.pieces, strict=True):
            mine.extend(theirs)
        return self

    def clear(self) -> None:
        """Back to nothing collected."""
        self.counts_K3.fill(0)
        self.pieces = [[] for _ in self.pieces]

    def values(self) -> list[np.ndarray]:
        """All that was collected of each expert."""
        return [np.concatenate(pieces) if pieces else np.empty(0, np.uint32) for pieces in self.pieces]


def _collect_all(tau_KN: np.ndarray, total: _Collected) -> None:
    for pieces, tau_N in zip(total.pieces, tau_KN, strict=True):
        pieces.append(tau_N.view(np.uint32) & _MAGNITUDE)


def _collect_inside(brackets_K2: np.ndarray, tau_KN: np.ndarray, total: _Collected) -> None:
    for k, (low, high) in enumerate(brackets_K2):
        bits_N = tau_KN[k].view(np.uint32)
        for start in range(0, bits_N.size, len(total.room)):
            count = _split(bits_N[start : start + len(total.room)], low, high, total.counts_K3[k], total.room)
            if count:
                total.pieces[k].append(total.room[:count].copy())


def _locate(counts_KB: np.ndarray, ranks_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bin of the rank-th largest entry (1 = largest) of each row, and that entry's rank inside its bin."""
    from_top_KB = np.cumsum(counts_KB[:, ::-1], axis=1)
    reached_K = np.array([np.searchsorted(row, rank) for row, rank in zip(from_top_KB, ranks_K, strict=True)])
    rows_K = np.arange(len(ranks_K))
    above_K = from_top_KB[rows_K, reached_K] - counts_KB[:, ::-1][rows_K, reached_K]
    return counts_KB.shape[1] - 1 - reached_K, ranks_K - above_K


@kernel
def _count_high(tau_KN: np.ndarray, total_KB: np.ndarray) -> None:
    for k in range(tau_KN.shape[0]):
        bits_N = tau_KN[k].view(np.uint32)
        for i in range(bits_N.size):
            total_KB[k, (bits_N[i] & _MAGNITUDE) >> _LOW_BITS] += 1


def _count_low_in(bins_K: np.ndarray, tau_KN: np.ndarray, total_KB: np.ndarray) -> None:
    _count_low(tau_KN, bins_K, total_KB)


@kernel
def _count_low(tau_KN: np.ndarray, bins_K: np.ndarray, total_KB: np.ndarray) -> None:
    found = np.empty(STRIP, np.uint32)
    for k in range(tau_KN.shape[0]):
        bits_N = tau_KN[k].view(np.uint32)
        first = bins_K[k] << _LOW_BITS
        for start in range(0, bits_N.size, STRIP):
            count = _gather(bits_N[start : start + STRIP], first, _LOW_MASK, found)
            for i in range(count):
                total_KB[k, found[i] & _LOW_MASK] += 1


@kernel
def _split(bits_N: np.ndarray, low: np.uint32, high: np.uint32, counts_3: np.ndarray, inside: np.ndarray) -> int:
    """Count the magnitudes above `high`, from `high` and from `low`, and put those strictly between into `inside`."""
    count = 0
    for start in range(0, bits_N.size, STRIP):
        strip = bits_N[start : start + STRIP]
        above, from_high, above_low, from_low = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
        for i in range(strip.size):
            magnitude = strip[i] & _MAGNITUDE
            above += np.uint32(magnitude > high)
            from_high += np.uint32(magnitude >= high)
            above_low += np.uint32(magnitude > low)
            from_low += np.uint32(magnitude >= low)
        counts_3[0] += above
        counts_3[1] += from_high
        counts_3[2] += from_low
        if above_low > from_high:
            count += _gather(strip, low + np.uint32(1), high - low - np.uint32(2), inside[count:])
    return count


@kernel
def _gather(strip: np.ndarray, low: np.uint32, span: np.uint32, out: np.ndarray) -> int:
    """Put the magnitudes low .. low + span of at most STRIP entries into `out`; their number."""
    # few match: flag them in a loop that vectorises, then pass over the flags eight at a time
    flags = np.zeros(STRIP, np.uint8)
    eights = flags.view(np.uint64)
    for i in range(strip.size):
        flags[i] = ((strip[i] & _MAGNITUDE) - low) <= span
    count = 0
    for word in range(eights.size):
        if eights[word] != 0:
            for i in range(word * 8, word * 8 + 8):
                if flags[i]:
                    out[count] = strip[i] & _MAGNITUDE
                    count += 1
    return count
