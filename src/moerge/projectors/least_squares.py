"""Weighted ridge regression from its normal equations, block by block. Shapes: R rows of a block, F features, K targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

PANEL = 512
"""Columns of a product that are computed together: the same whatever the threads, so that sums are."""

Map = Callable[[Callable[[int], None], Iterable[int]], Iterable[Any]]
"""`map`, or that of a pool of threads."""


class NormalEquations:
    """Sums over weighted rows, from which a regression is solved: memory is that of F x F, whatever the number of rows.

    Everything is float64. The same rows in the same blocks give the same bits for any number of threads of `map_panels`, if BLAS
    has one thread.
    """

    def __init__(self, features: int, targets: int, map_panels: Map = map) -> None:
        self._moment_FF = np.zeros((features, features))
        self._product_FK = np.zeros((features, targets))
        self._map_panels = map_panels

    def add(self, features_RF: np.ndarray, targets_RK: np.ndarray, weights_R: np.ndarray) -> None:
        """Some rows, and how much each counts."""
        weighted_RF = features_RF * weights_R[:, None]

        def panel(start: int) -> None:
            stop = start + PANEL
            self._moment_FF[start:stop, start:] += weighted_RF[:, start:stop].T @ features_RF[:, start:]
            self._product_FK[start:stop] += weighted_RF[:, start:stop].T @ targets_RK

        for _ in self._map_panels(panel, range(0, features_RF.shape[1], PANEL)):
            pass

    def covariance(self) -> np.ndarray:
        """The weighted second moments of all features but the last, less the part that the last, a constant, explains."""
        last_F = self._moment_FF[:-1, -1]
        upper = np.triu(self._moment_FF[:-1, :-1])
        full = upper + np.triu(upper, 1).T
        centred: np.ndarray = full - np.outer(last_F, last_F) / self._moment_FF[-1, -1]
        return centred

    def solve(self, penalty: float, *, free: int | None = None) -> np.ndarray:
        """The coefficients, [F, K]. Each feature is shrunk by `penalty` times its own sum of squares, all but number `free`.

        So the units of a feature do not matter, and the penalty is what an independent error of relative variance `penalty` in
        each feature would do. Features that are always zero get zero.
        """
        moment_FF = self._moment_FF
        for start in range(0, len(moment_FF), PANEL):  # in place, since there may be no room for another
            moment_FF[start + PANEL :, start : start + PANEL] = moment_FF[start : start + PANEL, start + PANEL :].T
        diagonal_F = np.diag(moment_FF).copy()
        shrunk_F = diagonal_F * (1 + penalty)
        if free is not None:
            shrunk_F[free] = diagonal_F[free]
        np.fill_diagonal(moment_FF, np.where(diagonal_F > 0, shrunk_F, 1))
        solution_FK: np.ndarray = np.linalg.solve(moment_FF, self._product_FK)
        np.fill_diagonal(moment_FF, diagonal_F)
        return solution_FK + 0.0  # no -0
