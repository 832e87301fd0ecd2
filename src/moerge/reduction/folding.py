"""Folding experts into one: neurons put in one order, a joint subspace, the down projection by least squares.

An expert computes f(x) = down @ (act(gate @ x) * (up @ x)). Shapes: T tokens, D width, F neurons; gate and up FD, down DF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_NEURONS = 8192
"""The assignment of neurons takes F^2 memory and F^3 time: above this it is not done."""


class ExpertWeights(NamedTuple):
    """One expert's matrices."""

    gate_FD: np.ndarray
    up_FD: np.ndarray
    down_DF: np.ndarray

    def permuted(self, order_F: np.ndarray) -> ExpertWeights:
        """Put the neurons in another order, which computes the same."""
        return ExpertWeights(self.gate_FD[order_F], self.up_FD[order_F], self.down_DF[:, order_F])


def weighted(members: Sequence[ExpertWeights], weights: Sequence[float]) -> ExpertWeights:
    """The weighted sum of experts, matrix by matrix."""
    return ExpertWeights(
        *(np.asarray(sum(w * m for w, m in zip(weights, matrices, strict=True))) for matrices in zip(*members, strict=True))
    )


def neuron_order(
    centre: ExpertWeights, member: ExpertWeights, centre_TF: np.ndarray | None = None, member_TF: np.ndarray | None = None
) -> np.ndarray:
    """The neuron of `member` for each neuron of `centre`, [F]: the assignment of least cost (REAM, arXiv 2604.04356).

    The cost of two neurons is the distance of their activations over tokens plus that of their weights (rows of gate and up,
    column of down), all scaled to length 1; of weights alone where no activations are given. REAM compresses the weights to 64
    dimensions first, which only saves time.
    """
    from scipy.optimize import linear_sum_assignment

    cost_FF = _distances(_neurons(centre), _neurons(member))
    if centre_TF is not None and member_TF is not None:
        cost_FF += _distances(centre_TF.T, member_TF.T)
    return np.asarray(linear_sum_assignment(cost_FF)[1])


def _neurons(expert: ExpertWeights) -> np.ndarray:
    return np.concatenate([expert.gate_FD, expert.up_FD, expert.down_DF.T], axis=1)


def _distances(first_FN: np.ndarray, second_FN: np.ndarray) -> np.ndarray:
    """Euclidean distances between rows scaled to length 1, [F, F]."""
    product_FF = _unit(first_FN) @ _unit(second_FN).T
    return np.asarray(np.sqrt(np.maximum(2 - 2 * product_FF, 0)))


def _unit(rows_FN: np.ndarray) -> np.ndarray:
    length_F1 = np.linalg.norm(rows_FN, axis=1, keepdims=True)
    return np.asarray(rows_FN / np.maximum(length_F1, np.finfo(rows_FN.dtype).tiny))


def joint_subspace(matrices: Sequence[np.ndarray], rank: int, grams: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """The `rank` leading left singular vectors of the matrices [O, I] side by side, [O, R] (Sub-MoE, arXiv 2506.23266).

    With `grams`, sums of x x^T over each matrix's inputs, they are those of outputs on these inputs (the whitened variant): the
    leading eigenvectors of sum_i W_i C_i W_i^T. Sub-MoE's merged matrix U S V_m^T is the weighted average of the matrices,
    projected on these vectors, since each block of the decomposition gives its matrix back.
    """
    total_OO = sum((matrix if grams is None else matrix @ grams[number]) @ matrix.T for number, matrix in enumerate(matrices))
    _, vectors_OO = np.linalg.eigh(np.asarray(total_OO))
    return np.asarray(vectors_OO[:, ::-1][:, :rank])


def fitted_down(average_DF: np.ndarray, target_TD: np.ndarray, activations_TF: np.ndarray, ridge: float) -> np.ndarray:
    """The down projection that maps a merged expert's activations to `target_TD` (MergeMoE, arXiv 2510.14436).

    Least squares shrunk to the average: down = average + (Y - average P) P^T (P P^T + lambda I)^-1, with lambda `ridge` times
    the mean of P P^T's diagonal. The error on these tokens is never above the average's.
    """
    activations_TF, average_DF = activations_TF.astype(np.float64), average_DF.astype(np.float64)
    gram_FF = activations_TF.T @ activations_TF
    rest_DF = (target_TD - activations_TF @ average_DF.T).T @ activations_TF
    gram_FF[np.diag_indices(len(gram_FF))] += ridge * max(np.trace(gram_FF) / len(gram_FF), np.finfo(float).tiny)
    return np.asarray(average_DF + np.linalg.solve(gram_FF, rest_DF.T).T)
