"""Subspaces that task vectors span, and how much of one lies in another. Shapes: O, I rows and columns of a matrix, R rank."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moerge.tensors.linalg import leading_svd

SHARE = 0.1
"""MADE-IT's rho: the rank as a share of a matrix's smaller side; beyond 0.6 its merges collapse."""
_TOLERANCE = 1e-4


class Subspace(NamedTuple):
    """Orthonormal bases of what a matrix writes to [O, R] and reads from [R, I]."""

    output_OR: np.ndarray
    input_RI: np.ndarray


def subspace_of(tau_OI: np.ndarray, share: float = SHARE) -> Subspace | None:
    """The leading singular vectors of a task vector, `share` of the smaller side of them; None for zero."""
    rank = max(1, int(share * min(tau_OI.shape)))
    if not tau_OI.any():
        return None
    left_OR, values_R, right_RI = leading_svd(np.ascontiguousarray(tau_OI, np.float32), rank, tolerance=_TOLERANCE)
    there_R = values_R > values_R[0] * 1e-6
    return Subspace(left_OR[:, there_R], right_RI[there_R])


def affinity(a: Subspace | None, b: Subspace | None) -> float | None:
    """( ||U_a^T U_b||^2 + ||V_a^T V_b||^2 ) / 2R, in [0, 1]: 1 for the same subspaces, 0 for orthogonal ones; None for zero.

    MADE-IT (Qiu et al. 2026, arXiv 2604.22464) compares task vectors by projections on such subspaces, as points of Grassmann
    manifolds; its exact formula is not public, and this is the mean of the squared cosines of all principal angles. It depends on
    neither the scale nor the signs nor a rotation within a subspace. R is the larger of the two ranks.
    """
    if a is None or b is None:
        return None
    outputs = _square(a.output_OR.T, b.output_OR)
    inputs = _square(a.input_RI, b.input_RI.T)
    return (outputs + inputs) / (2 * max(len(a.input_RI), len(b.input_RI)))


def _square(first: np.ndarray, second: np.ndarray) -> float:
    """The squared Frobenius norm of a product."""
    return float(np.square(first.astype(np.float64) @ second.astype(np.float64)).sum())
