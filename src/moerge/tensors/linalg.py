"""Truncated singular value decomposition of a matrix in memory, and conjugate gradients. Shapes: R rows, C columns, K vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

_PANEL = 1024
"""Rows or columns of a product that are computed together: the same whatever the threads, so that results are."""
_SPARE = 8
"""Vectors beyond half as many again as wanted: they make the wanted ones converge (Halko et al. 2011, section 4.3)."""
_ITERATIONS = 200
_RESIDUAL = 1e-6

Map = Callable[[Callable[[int], None], Iterable[int]], Iterable[Any]]
"""`map`, or that of a pool of threads."""


def leading_svd(
    matrix_RC: np.ndarray, rank: int, *, tolerance: float = 1e-6, spread: Map = map
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first `rank` left singular vectors [R, K], singular values [K], and right singular vectors [K, C], in float32.

    Subspace iteration with a random start that is always the same (Halko, Martinsson and Tropp 2011, algorithm 4.4), until no
    value changes by more than `tolerance` of itself. Vectors are defined up to a common sign. What comes out does not depend
    on the threads of `spread` if BLAS has one.
    """
    width = min(*matrix_RC.shape, rank + rank // 2 + _SPARE)
    start_CK = np.random.default_rng(0).standard_normal((matrix_RC.shape[1], width), np.float32)
    basis_CK = _orthogonal(start_CK)[0]
    before_K = np.zeros(width)
    for _ in range(_ITERATIONS):
        image_RK, _ = _orthogonal(_times(matrix_RC, basis_CK, spread))
        basis_CK, now_K = _orthogonal(_times(matrix_RC.T, image_RK, spread))
        if np.allclose(now_K[:rank], before_K[:rank], rtol=tolerance, atol=0):
            break
        before_K = now_K
    left_RK, sigma_K, rotation_KK = np.linalg.svd(_times(matrix_RC, basis_CK, spread), full_matrices=False)
    right_KC = rotation_KK[:rank] @ basis_CK.T
    return left_RK[:, :rank], sigma_K[:rank], right_KC


def _orthogonal(matrix_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An orthonormal basis of the columns, and how much each adds to those before it."""
    basis_RK, upper_KK = np.linalg.qr(matrix_RK)
    return basis_RK, np.abs(np.diag(upper_KK))


def _times(matrix_RC: np.ndarray, other_CK: np.ndarray, spread: Map) -> np.ndarray:
    product_RK = np.empty((matrix_RC.shape[0], other_CK.shape[1]), np.float32)

    def panel(start: int) -> None:
        np.matmul(matrix_RC[start : start + _PANEL], other_CK, out=product_RK[start : start + _PANEL])

    for _ in spread(panel, range(0, len(product_RK), _PANEL)):
        pass
    return product_RK


def log_softmax(logit_SK: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    logit_SK = logit_SK - logit_SK.max(axis=-1, keepdims=True)
    log_q_SK: np.ndarray = logit_SK - np.log(np.exp(logit_SK).sum(axis=-1, keepdims=True))
    return log_q_SK


def conjugate_gradients(product: Callable[[np.ndarray], np.ndarray], target_RC: np.ndarray, iterations: int) -> np.ndarray:
    """Solve a positive semidefinite system by at most so many steps from zero, to a residual of 1e-6 of the target.

    `product` multiplies by the system's matrix, and `target_RC` lies in its range.
    """
    x_RC, residual_RC = np.zeros_like(target_RC), target_RC.copy()
    direction_RC, square = residual_RC.copy(), float((residual_RC**2).sum())
    goal = _RESIDUAL**2 * square
    for _ in range(iterations):
        if square <= goal:
            break
        image_RC = product(direction_RC)
        curvature = float((direction_RC * image_RC).sum())
        if curvature <= 0:
            break
        x_RC += square / curvature * direction_RC
        residual_RC -= square / curvature * image_RC
        before, square = square, float((residual_RC**2).sum())
        direction_RC = residual_RC + square / before * direction_RC
    return x_RC
