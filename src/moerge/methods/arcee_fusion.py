"""Arcee fusion. Shapes: N elements, R rows."""

from __future__ import annotations

import math
from collections.abc import Generator
from functools import partial
from typing import Any, ClassVar

import numpy as np

from moerge.methods.magnitude import magnitudes_at
from moerge.methods.method import Block, Measurement, MergeMethod, Statistic
from moerge.tensors.kernels import kernel

_QUARTERS = (1, 2, 3)


class ArceeFusion(MergeMethod):
    """theta = theta_base + tau where |tau| * KL(softmax(row of theta) || softmax(row of theta_base)) >= q_2 + 1.5 (q_3 - q_1).

    Of exactly one expert: it takes over the entries that stand out, q being the quartiles of that importance in a tensor; a row
    is the last axis, a vector is one row (Arcee AI; mergekit's `arcee_fusion`). Quartile i is the entry int(i / 4 * (n - 1)) in
    ascending order, of all n. mergekit takes those of a random sample of a million entries of larger tensors, and adds 1e-8
    to probabilities.

    Not for a low threshold of change: where most entries of a tensor did not change, q is zero and all that did is taken over.
    """

    name: ClassVar[str] = "arcee_fusion"
    uses_task_vectors: ClassVar[bool] = True
    uses_weights: ClassVar[bool] = False
    exact_experts: ClassVar[int | None] = 1

    @property
    def measures(self) -> int:
        """One pass for the rows, two for the quartiles."""
        return 3

    def measure_tensor(self, experts: int, shape: tuple[int, ...]) -> Measurement:
        """The divergence of each row, float32 [R], the length of a row, and the smallest importance that is taken over."""
        size = math.prod(shape)
        columns = shape[-1] if len(shape) > 1 else size
        zeros = partial(_Rows, size // columns)
        rows = yield Statistic(zeros, partial(_add_rows, columns), uses_base=True, uses_start=True)
        divergences_R = rows.divergences()
        return divergences_R, columns, (yield from _threshold(divergences_R, columns, size))

    def merge(self, block: Block) -> None:
        """The task vector where it is important, from the base on."""
        divergences_R, columns, smallest = block.statistic
        tau_N = block.theta_EN[0]
        _importance(tau_N, divergences_R, block.start, columns, block.out_N)
        np.add(block.base_N, np.where(block.out_N >= smallest, tau_N, np.float32(0)), out=block.out_N)


def _threshold(divergences_R: np.ndarray, columns: int, size: int) -> Generator[Statistic, Any, np.float32]:
    """The quartiles' threshold, of importances that are never kept."""
    steps, total = magnitudes_at([(0, size - quarter * (size - 1) // 4) for quarter in _QUARTERS], 1, size), None
    while True:
        try:
            statistic = steps.send(total)
        except StopIteration as finished:
            first, median, third = finished.value
            threshold: np.float32 = median + np.float32(1.5) * (third - first)
            return threshold
        add = partial(_add_importance, statistic, divergences_R, columns)
        total = yield Statistic(statistic.zeros, add, statistic.runs, uses_start=True)


def _add_importance(
    statistic: Statistic, divergences_R: np.ndarray, columns: int, tau_EN: np.ndarray, total: Any, start: int
) -> None:
    importance_N = np.empty(tau_EN.shape[1], np.float32)
    _importance(tau_EN[0], divergences_R, start, columns, importance_N)
    statistic.add(importance_N[None], total)


class _Rows:
    """Sums over each row of e^x, e^y and e^x (x - y), x the expert and y the base, all divided by e^top: float64 [4, R]."""

    def __init__(self, rows: int) -> None:
        self.sums_4R = np.zeros((4, rows))
        self.clear()

    def clear(self) -> None:
        """Back to no elements."""
        self.sums_4R[0], self.sums_4R[1:] = -np.inf, 0

    def __iadd__(self, other: _Rows) -> _Rows:
        top_R = np.maximum(self.sums_4R[0], other.sums_4R[0])
        seen_R = np.isfinite(top_R)
        for sums_4R in (self.sums_4R, other.sums_4R):
            sums_4R[1:, seen_R] *= np.exp(sums_4R[0, seen_R] - top_R[seen_R])
        self.sums_4R[1:] += other.sums_4R[1:]
        self.sums_4R[0] = top_R
        return self

    def divergences(self) -> np.ndarray:
        """sum p (x - y) - (log sum e^x - log sum e^y), p = e^x / sum e^x, of each row; never below zero."""
        _, expert_R, base_R, products_R = self.sums_4R
        divergences_R: np.ndarray = np.maximum(0, products_R / expert_R - (np.log(expert_R) - np.log(base_R))).astype(np.float32)
        return divergences_R


def _add_rows(columns: int, tau_EN: np.ndarray, total: _Rows, base_N: np.ndarray, start: int) -> None:
    _add_exponentials(tau_EN[0], base_N, start, columns, total.sums_4R)


@kernel
def _add_exponentials(tau_N: np.ndarray, base_N: np.ndarray, start: int, columns: int, sums_4R: np.ndarray) -> None:
    for row in range(start // columns, (start + tau_N.size - 1) // columns + 1):
        begin, end = max(0, row * columns - start), min(tau_N.size, (row + 1) * columns - start)
        before = top = sums_4R[0, row]
        for i in range(begin, end):
            base, tau = np.float64(base_N[i]), np.float64(tau_N[i])
            top = max(top, base, base + tau)
        earlier = np.exp(before - top)
        expert_sum, base_sum, products = sums_4R[1, row] * earlier, sums_4R[2, row] * earlier, sums_4R[3, row] * earlier
        for i in range(begin, end):
            base, tau = np.float64(base_N[i]), np.float64(tau_N[i])
            share = np.exp(base + tau - top)
            expert_sum += share
            base_sum += np.exp(base - top)
            products += share * tau
        sums_4R[0, row], sums_4R[1, row], sums_4R[2, row], sums_4R[3, row] = top, expert_sum, base_sum, products


@kernel
def _importance(tau_N: np.ndarray, divergences_R: np.ndarray, start: int, columns: int, out_N: np.ndarray) -> None:
    for row in range(start // columns, (start + tau_N.size - 1) // columns + 1):
        divergence = divergences_R[row]
        for i in range(max(0, row * columns - start), min(tau_N.size, (row + 1) * columns - start)):
            out_N[i] = abs(tau_N[i]) * divergence
