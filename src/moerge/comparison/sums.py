"""One pass over experts' task vectors: sums from which cosines, norms, sign conflicts and TIES' losses follow.

Every sum is of float64 products of float32 values, which are exact, added in a fixed order. Sums of parts add up to those of
the whole, so any set of tensors can be looked at as one long vector.

Shapes: E experts, P pairs of them in the order (0, 1), (0, 2), ..., (1, 2), ..., N elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from moerge.methods.method import Statistic
from moerge.operations.operations import Merge
from moerge.tensors.kernels import STRIP, kernel

_LANES = 1 << 9
"""Sums that run side by side, so that loops vectorise without reordering; they are added up at the end of a block."""
_OF_EXPERT, _OF_PAIR = 6, 4


class ExpertSums(NamedTuple):
    """An expert's task vector tau on a base b, or its parameters where there is no base, which then count as tau."""

    parameters: float
    base_square: float
    """sum b^2"""
    base_dot: float
    """sum b * tau"""
    square: float
    """sum tau^2"""
    mass: float
    """sum |tau|"""
    changed: float
    """how many tau are not zero"""
    kept: float
    """sum |tau| of what TIES does not trim"""
    elected: float
    """sum |tau| of what then has the elected sign"""
    averaged: float
    """sum tau * (mean of all experts' tau)"""


class PairSums(NamedTuple):
    """Two experts' task vectors, or their parameters where there is no base; `theta` are always the parameters."""

    parameters: float
    dot: float
    """sum tau_i * tau_j"""
    weight: float
    """sum |tau_i * tau_j|"""
    conflicts: float
    """how many tau_i * tau_j are negative"""
    both: float
    """how many tau_i * tau_j are not zero"""
    square_a: float
    square_b: float
    theta_dot: float
    theta_square_a: float
    theta_square_b: float


@dataclass(frozen=True)
class TensorSums:
    """The sums of one tensor, by expert and by pair of experts."""

    experts: dict[str, ExpertSums]
    pairs: dict[tuple[str, str], PairSums]


def statistic(operation: Merge, lowest_E: np.ndarray | None) -> Statistic:
    """The pass over an operation's tensors. TIES trims what is smaller than `lowest_E`; None: nothing is trimmed."""
    experts = len(operation.experts)
    size = 1 + _OF_EXPERT * experts + _OF_PAIR * (experts * (experts - 1) // 2)
    lowest_E = np.zeros(experts, np.float32) if lowest_E is None else lowest_E
    add = partial(_add, lowest_E, operation.weights_E)
    return Statistic(partial(np.zeros, size), add, uses_base=operation.base is not None)


def read(operation: Merge, total: np.ndarray) -> TensorSums:
    """Turn a pass's total into figures."""
    names, size = [source.model for source in operation.experts], operation.experts[0].tensor.size
    base_square, count = float(total[0]), len(names)
    experts_EF = total[1 : 1 + _OF_EXPERT * count].reshape(count, _OF_EXPERT).tolist()
    pairs_PF = total[1 + _OF_EXPERT * count :].reshape(-1, _OF_PAIR).tolist()
    places = list(itertools.combinations(range(count), 2))
    dots_EE = np.diag([square for _, square, *_ in experts_EF])
    for (i, j), (dot, *_) in zip(places, pairs_PF, strict=True):
        dots_EE[i, j] = dots_EE[j, i] = dot
    experts = {
        name: ExpertSums._make((size, base_square, *sums, averaged))
        for name, sums, averaged in zip(names, experts_EF, dots_EE.mean(axis=1).tolist(), strict=True)
    }
    pairs = {}
    for (i, j), sums in zip(places, pairs_PF, strict=True):
        a, b = experts[names[i]], experts[names[j]]
        theta_dot = base_square + a.base_dot + b.base_dot + sums[0]
        theta = (theta_dot, _theta_square(a), _theta_square(b))
        pairs[names[i], names[j]] = PairSums._make((size, *sums, a.square, b.square, *theta))
    return TensorSums(experts, pairs)


def _theta_square(sums: ExpertSums) -> float:
    return sums.base_square + 2 * sums.base_dot + sums.square


def _add(lowest_E: np.ndarray, weights_E: np.ndarray, tau_EN: np.ndarray, total: np.ndarray, *base: np.ndarray) -> None:
    _add_block(tau_EN, base[0] if base else tau_EN[0], bool(base), lowest_E, weights_E, total)


@kernel
def _add_block(
    tau_EN: np.ndarray, base_N: np.ndarray, has_base: bool, lowest_E: np.ndarray, weights_E: np.ndarray, total: np.ndarray
) -> None:
    experts, size = tau_EN.shape
    sums, counts = np.zeros((total.size, _LANES)), np.zeros((total.size, _LANES), np.uint32)
    elected = np.empty(STRIP, np.bool_)
    for start in range(0, size, STRIP):
        stop = min(start + STRIP, size)
        _elect(tau_EN[:, start:stop], lowest_E, weights_E, elected)
        for first in range(start, stop, _LANES):
            last = min(first + _LANES, stop)
            if has_base:
                _add_square(base_N[first:last], sums[0])
        row = 1
        for k in range(experts):
            for first in range(start, stop, _LANES):
                last = min(first + _LANES, stop)
                if has_base:
                    _add_dot(tau_EN[k, first:last], base_N[first:last], sums[row])
                _add_expert(tau_EN[k, first:last], lowest_E[k], weights_E[k], elected[first - start :], sums[row + 1 :])
                _count_changed(tau_EN[k, first:last], counts[row + 3])
            row += _OF_EXPERT
        for i in range(experts):
            for j in range(i + 1, experts):
                for first in range(start, stop, _LANES):
                    last = min(first + _LANES, stop)
                    _add_pair(tau_EN[i, first:last], tau_EN[j, first:last], sums[row:])
                    _count_pair(tau_EN[i, first:last], tau_EN[j, first:last], counts[row + 2 :])
                row += _OF_PAIR
    for row in range(total.size):
        for lane in range(_LANES):
            total[row] += sums[row, lane] + counts[row, lane]


@kernel
def _elect(tau_ES: np.ndarray, lowest_E: np.ndarray, weights_E: np.ndarray, elected: np.ndarray) -> None:
    """The sign of the weighted sum of what is not trimmed, as in `formulas.elected_sum`: True for plus, and for zero."""
    mass = np.zeros(STRIP, np.float32)
    for k in range(len(lowest_E)):
        tau_S, lowest, weight = tau_ES[k], lowest_E[k], weights_E[k]
        for i in range(tau_S.size):
            mass[i] += weight * tau_S[i] if abs(tau_S[i]) >= lowest else np.float32(0)
    for i in range(tau_ES.shape[1]):
        elected[i] = mass[i] >= np.float32(0)


@kernel
def _add_square(value_L: np.ndarray, sum_L: np.ndarray) -> None:
    for i in range(value_L.size):
        value = np.float64(value_L[i])
        sum_L[i] += value * value


@kernel
def _add_dot(a_L: np.ndarray, b_L: np.ndarray, sum_L: np.ndarray) -> None:
    for i in range(a_L.size):
        sum_L[i] += np.float64(a_L[i]) * np.float64(b_L[i])


@kernel
def _add_expert(tau_L: np.ndarray, lowest: np.float32, weight: np.float32, elected_L: np.ndarray, sums_FL: np.ndarray) -> None:
    square_L, mass_L, kept_L, elected_mass_L = sums_FL[0], sums_FL[1], sums_FL[3], sums_FL[4]
    for i in range(tau_L.size):
        tau = np.float64(tau_L[i])
        square_L[i] += tau * tau
        mass_L[i] += abs(tau)
    for i in range(tau_L.size):
        size = abs(tau_L[i])
        kept = np.float64(size) if size >= lowest else 0.0
        kept_L[i] += kept
        elected_mass_L[i] += kept if (weight * tau_L[i] >= np.float32(0)) == elected_L[i] else 0.0


@kernel
def _add_pair(a_L: np.ndarray, b_L: np.ndarray, sums_FL: np.ndarray) -> None:
    dot_L, weight_L = sums_FL[0], sums_FL[1]
    for i in range(a_L.size):
        product = np.float64(a_L[i]) * np.float64(b_L[i])
        dot_L[i] += product
        weight_L[i] += abs(product)


@kernel
def _count_changed(tau_L: np.ndarray, changed_L: np.ndarray) -> None:
    for i in range(tau_L.size):
        changed_L[i] += np.uint32(tau_L[i] != np.float32(0))


@kernel
def _count_pair(a_L: np.ndarray, b_L: np.ndarray, counts_FL: np.ndarray) -> None:
    """Opposite signs, and pairs of which none is zero."""
    conflicts_L, both_L = counts_FL[0], counts_FL[1]
    a_bits_L, b_bits_L = a_L.view(np.uint32), b_L.view(np.uint32)
    for i in range(a_L.size):
        both = np.uint32((a_L[i] != np.float32(0)) & (b_L[i] != np.float32(0)))
        both_L[i] += both
        conflicts_L[i] += both & ((a_bits_L[i] ^ b_bits_L[i]) >> np.uint32(31))


def names_of(sums: Sequence[TensorSums]) -> tuple[str, ...]:
    """All experts, in the order they first appear."""
    return tuple(dict.fromkeys(name for tensor in sums for name in tensor.experts))
