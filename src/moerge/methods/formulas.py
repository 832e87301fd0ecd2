"""Formulas that several methods share. Shapes: K experts, N elements; loops run over N innermost, so that they vectorise."""

from __future__ import annotations

import numpy as np

from moerge.methods.jit import kernel


@kernel
def weighted_sum(theta_KN: np.ndarray, weights_K: np.ndarray, divisor: np.float32, out_N: np.ndarray) -> None:
    """out = sum_k w_k theta_k / divisor, added up in the order of k."""
    for i in range(out_N.size):
        out_N[i] = weights_K[0] * theta_KN[0, i]
    for k in range(1, len(weights_K)):
        weight = weights_K[k]
        for i in range(out_N.size):
            out_N[i] += weight * theta_KN[k, i]
    if divisor != np.float32(1):
        for i in range(out_N.size):
            out_N[i] /= divisor


@kernel
def elected_sum(tau_KN: np.ndarray, weights_K: np.ndarray, mean: bool, out_N: np.ndarray) -> None:
    """TIES' sign election and disjoint merge (Yadav et al. 2023, algorithm 1) of task vectors that are already trimmed.

    The sign of sum_k w_k tau_k is elected, plus where the sum is zero (as mergekit; the original falls back to the sign
    most frequent in the whole model). out = the sum of the w_k tau_k that agree with it, or, with `mean`, that sum
    divided by the weights of those that agree and are not zero. Overwrites tau_KN with w_k tau_k.
    """
    experts = len(weights_K)
    out_N[:] = np.float32(0)
    for k in range(experts):
        weight = weights_K[k]
        for i in range(out_N.size):
            tau_KN[k, i] *= weight
            out_N[i] += tau_KN[k, i]
    elected_N = np.empty(out_N.size, np.bool_)
    for i in range(out_N.size):
        elected_N[i] = out_N[i] >= np.float32(0)
        out_N[i] = np.float32(0)
    for k in range(experts):
        for i in range(out_N.size):
            tau = tau_KN[k, i]
            out_N[i] += tau if (tau >= np.float32(0)) == elected_N[i] else np.float32(0)
    if mean:
        mass_N = np.zeros(out_N.size, np.float32)
        for k in range(experts):
            weight = weights_K[k]
            for i in range(out_N.size):
                tau = tau_KN[k, i]
                agrees = (tau != np.float32(0)) and ((tau >= np.float32(0)) == elected_N[i])
                mass_N[i] += weight if agrees else np.float32(0)
        for i in range(out_N.size):
            out_N[i] = out_N[i] / mass_N[i] if mass_N[i] != np.float32(0) else np.float32(0)
