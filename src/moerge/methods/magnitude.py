"""Exact magnitude thresholds without a sort, from histograms that add up over blocks, tensors and machines.

|tau| as a float32 has 31 bits; their order as an integer is its order as a number. A first pass counts the upper 15, which
finds the bin that holds the threshold; a second pass counts the lower 16 inside that bin, which finds the threshold itself.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import numpy as np

from moerge.methods.jit import kernel
from moerge.methods.method import Measurement, Statistic

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_LOW_BITS = np.uint32(16)
_LOW_MASK = np.uint32(0xFFFF)


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
    coarse_KB = yield Statistic(partial(np.zeros, (experts, 1 << 15), np.int64), _count_high)
    bins_K, ranks_K = _locate(coarse_KB, np.full(experts, kept))
    fine_KB = yield Statistic(partial(np.zeros, (experts, 1 << 16), np.int64), partial(_count_low_in, bins_K.astype(np.uint32)))
    low_K, _ = _locate(fine_KB, ranks_K)
    return ((bins_K << 16) | low_K).astype(np.uint32).view(np.float32)


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
    # few entries lie in the bin: flag them in a loop that vectorises, then pass over the flags eight at a time
    size = tau_KN.shape[1]
    words = (size + 7) // 8
    flags = np.zeros(words * 8, np.uint8)
    eights = flags.view(np.uint64)
    for k in range(tau_KN.shape[0]):
        bits_N = tau_KN[k].view(np.uint32)
        wanted = bins_K[k]
        for i in range(size):
            flags[i] = ((bits_N[i] & _MAGNITUDE) >> _LOW_BITS) == wanted
        for word in range(words):
            if eights[word] != 0:
                for i in range(word * 8, min(word * 8 + 8, size)):
                    if flags[i]:
                        total_KB[k, bits_N[i] & _LOW_MASK] += 1
