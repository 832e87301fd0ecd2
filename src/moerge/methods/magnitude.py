"""Exact magnitude thresholds without sorting.

|tau| as a float32 has 31 bits; their order as an integer is its order as a number. Two histograms find the threshold: a first
pass counts the upper 15 bits, which gives its bin, a second the lower 16 inside that bin. Of a large tensor a sample gives a
bracket; then one pass counts what lies above it and collects the little that lies inside, which settles it, or shows that the
sample misled. Either way the result is exact.

Shapes: E experts, T targets: an expert and a rank each.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from moerge.methods.method import Measurement, Statistic
from moerge.tensors.kernels import STRIP, kernel

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_LOW_BITS = np.uint32(16)
_LOW_MASK = np.uint32(0xFFFF)
_LARGE, _HUGE = 1 << 20, 1 << 30
"""Sizes between which a sample pays: below, a histogram is cheap; above, what a bracket collects would be large."""
_RUNS = 16
_MARGIN = 0.005
"""Half a bracket's width as a fraction of all entries: six standard errors of a sample of 2^18 independent entries."""


def kept_count(density: float, size: int) -> int:
    """Return the number of entries that a density keeps: ceil(density * size), since (1 - density) * size is rounded down to
    drop.

    The density counts as the decimal number that was written: 0.8 of 10 entries is 8, never 9.
    """
    return math.ceil(Fraction(str(density)) * size)


def magnitude_thresholds(kept: Sequence[int], size: int) -> Measurement:
    """Passes that find, for each expert, the magnitude of its `kept`-th largest entry, as float32 [E].

    Entries that equal the threshold are all kept, as in the original TIES, so that which ones does not depend on order. Where
    all are kept, the threshold is zero.
    """
    trimmed = [k for k, count in enumerate(kept) if count < size]
    thresholds_E = np.zeros(len(kept), np.float32)
    thresholds_E[trimmed] = yield from magnitudes_at([(k, kept[k]) for k in trimmed], len(kept), size)
    return thresholds_E


def magnitudes_at(targets: Sequence[tuple[int, int]], experts: int, size: int) -> Measurement:
    """Passes that find magnitudes by expert and rank (1 is the largest of `size` entries), as float32 [T]."""
    if not targets:
        return np.zeros(0, np.float32)
    wanted = _Targets(np.array([k for k, _ in targets]), np.array([rank for _, rank in targets]))
    bits_T = None
    if _LARGE <= size <= _HUGE:
        bits_T = yield from _from_bracket(wanted, experts, size)
    if bits_T is None:
        bits_T = yield from _from_histograms(wanted, experts)
    return bits_T.astype(np.uint32).view(np.float32)


@dataclass(frozen=True)
class _Targets:
    """The tensors whose magnitudes are sought, and their ranks."""

    experts_T: np.ndarray
    ranks_T: np.ndarray

    def __len__(self) -> int:
        return len(self.ranks_T)


def _from_bracket(wanted: _Targets, experts: int, size: int) -> Generator[Statistic, Any, np.ndarray | None]:
    """Magnitudes as bits [T]; None where a sample misjudged them."""
    sample: _Collected = yield Statistic(partial(_Collected, experts), _collect_all, runs=_RUNS)
    values = sample.values()
    brackets = [_bracket(values[k], rank / size) for k, rank in zip(wanted.experts_T, wanted.ranks_T, strict=True)]
    brackets_T2 = np.array(brackets, np.uint32)
    add = partial(_collect_inside, wanted.experts_T, brackets_T2)
    found: _Collected = yield Statistic(partial(_Collected, len(wanted)), add)
    bits_T = np.empty(len(wanted), np.int64)
    for t, inside in enumerate(found.values()):
        rank = wanted.ranks_T[t]
        above, from_high, from_low = (int(count) for count in found.counts_T3[t])
        if above < rank <= from_high:
            bits_T[t] = brackets_T2[t, 1]
        elif from_high < rank <= from_high + len(inside):
            bits_T[t] = _select(inside, rank - from_high)
        elif from_high + len(inside) < rank <= from_low:
            bits_T[t] = brackets_T2[t, 0]
        else:
            return None
    return bits_T


def _bracket(sample_N: np.ndarray, density: float) -> tuple[int, int]:
    """Two of a sample's magnitudes, as bits, between which the whole tensor's threshold most likely lies."""
    low, high = (np.clip(round(len(sample_N) * (density + side * _MARGIN)), 1, len(sample_N)) for side in (1, -1))
    return _select(sample_N, low), _select(sample_N, high)


def _select(bits_N: np.ndarray, rank: int) -> int:
    """The rank-th largest of magnitudes' bits; like the two passes, on what is in memory."""
    coarse_EB, fine_TB = np.zeros((1, 1 << 15), np.int64), np.zeros((1, 1 << 16), np.int64)
    values_EN = bits_N.view(np.float32)[None]
    _count_high(values_EN, coarse_EB)
    bin_T, rank_T = _locate(coarse_EB, np.array([rank]))
    _count_low(values_EN, np.array([0]), bin_T.astype(np.uint32), fine_TB)
    return int(bin_T[0]) << 16 | int(_locate(fine_TB, rank_T)[0][0])


def _from_histograms(wanted: _Targets, experts: int) -> Generator[Statistic, Any, np.ndarray]:
    """Magnitudes as bits [T]."""
    coarse_EB = yield Statistic(partial(np.zeros, (experts, 1 << 15), np.int64), _count_high)
    bins_T, ranks_T = _locate(coarse_EB[wanted.experts_T], wanted.ranks_T)
    add = partial(_count_low_in, wanted.experts_T, bins_T.astype(np.uint32))
    fine_TB = yield Statistic(partial(np.zeros, (len(wanted), 1 << 16), np.int64), add)
    low_T, _ = _locate(fine_TB, ranks_T)
    bits_T: np.ndarray = (bins_T << 16) | low_T
    return bits_T


class _Collected:
    """Bits of magnitudes by target, and the number [T, 3] of those above `high`, from `high` and from `low` of a bracket."""

    def __init__(self, targets: int) -> None:
        self.counts_T3 = np.zeros((targets, 3), np.int64)
        self.pieces: list[list[np.ndarray]] = [[] for _ in range(targets)]
        self.room = np.empty(16 * STRIP, np.uint32)

    def __iadd__(self, other: _Collected) -> _Collected:
        self.counts_T3 += other.counts_T3
        for mine, theirs in zip(self.pieces, other.pieces, strict=True):
            mine.extend(theirs)
        return self

    def clear(self) -> None:
        """Back to nothing collected."""
        self.counts_T3.fill(0)
        self.pieces = [[] for _ in self.pieces]

    def values(self) -> list[np.ndarray]:
        """All that was collected for each target."""
        return [np.concatenate(pieces) if pieces else np.empty(0, np.uint32) for pieces in self.pieces]


def _collect_all(tau_EN: np.ndarray, total: _Collected) -> None:
    for pieces, tau_N in zip(total.pieces, tau_EN, strict=True):
        pieces.append(tau_N.view(np.uint32) & _MAGNITUDE)


def _collect_inside(experts_T: np.ndarray, brackets_T2: np.ndarray, tau_EN: np.ndarray, total: _Collected) -> None:
    for t, (low, high) in enumerate(brackets_T2):
        bits_N = tau_EN[experts_T[t]].view(np.uint32)
        for start in range(0, bits_N.size, len(total.room)):
            count = _split(bits_N[start : start + len(total.room)], low, high, total.counts_T3[t], total.room)
            if count:
                total.pieces[t].append(total.room[:count].copy())


def _locate(counts_TB: np.ndarray, ranks_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bin of the rank-th largest entry (1 = largest) of each row, and that entry's rank inside its bin."""
    from_top_TB = np.cumsum(counts_TB[:, ::-1], axis=1)
    reached_T = np.array([np.searchsorted(row, rank) for row, rank in zip(from_top_TB, ranks_T, strict=True)])
    rows_T = np.arange(len(ranks_T))
    above_T = from_top_TB[rows_T, reached_T] - counts_TB[:, ::-1][rows_T, reached_T]
    return counts_TB.shape[1] - 1 - reached_T, ranks_T - above_T


@kernel
def _count_high(tau_EN: np.ndarray, total_EB: np.ndarray) -> None:
    for k in range(tau_EN.shape[0]):
        bits_N = tau_EN[k].view(np.uint32)
        for i in range(bits_N.size):
            total_EB[k, (bits_N[i] & _MAGNITUDE) >> _LOW_BITS] += 1


def _count_low_in(experts_T: np.ndarray, bins_T: np.ndarray, tau_EN: np.ndarray, total_TB: np.ndarray) -> None:
    _count_low(tau_EN, experts_T, bins_T, total_TB)


@kernel
def _count_low(tau_EN: np.ndarray, experts_T: np.ndarray, bins_T: np.ndarray, total_TB: np.ndarray) -> None:
    found = np.empty(STRIP, np.uint32)
    for t in range(len(bins_T)):
        bits_N = tau_EN[experts_T[t]].view(np.uint32)
        first = bins_T[t] << _LOW_BITS
        for start in range(0, bits_N.size, STRIP):
            count = _gather(bits_N[start : start + STRIP], first, _LOW_MASK, found)
            for i in range(count):
                total_TB[t, found[i] & _LOW_MASK] += 1


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
