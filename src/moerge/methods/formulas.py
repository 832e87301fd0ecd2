"""Formulas that several methods share. Shapes: E experts, N elements; loops run over N innermost, so that they vectorise."""

from __future__ import annotations

import numpy as np

from moerge.tensors.kernels import STRIP, kernel


@kernel
def weighted_sum(theta_EN: np.ndarray, weights_E: np.ndarray, divisor: np.float32, out_N: np.ndarray) -> None:
    """out = sum_k w_k theta_k / divisor, added up in the order of k."""
    for i in range(out_N.size):
        out_N[i] = weights_E[0] * theta_EN[0, i]
    for k in range(1, len(weights_E)):
        weight = weights_E[k]
        for i in range(out_N.size):
            out_N[i] += weight * theta_EN[k, i]
    if divisor != np.float32(1):
        for i in range(out_N.size):
            out_N[i] /= divisor


@kernel
def weigh_chunks(tau_EN: np.ndarray, c_EC: np.ndarray, chunk: int, start: int, out_N: np.ndarray) -> None:
    """out = sum_k c_k tau_k, c by chunks of so many entries; `start` is the index of the first entry, counted as chunks are."""
    out_N[:] = np.float32(0)
    for piece in range(start // chunk, (start + out_N.size - 1) // chunk + 1):
        begin, end = max(0, piece * chunk - start), min(out_N.size, (piece + 1) * chunk - start)
        out_M = out_N[begin:end]
        for k in range(len(c_EC)):
            c, tau_M = c_EC[k, piece], tau_EN[k, begin:end]
            for i in range(out_M.size):
                out_M[i] += c * tau_M[i]


@kernel
def elected_sum(tau_EN: np.ndarray, weights_E: np.ndarray, mean: bool, out_N: np.ndarray) -> None:
    """TIES' sign election and disjoint merge (Yadav et al. 2023, algorithm 1) of task vectors that are already trimmed.

    The sign of sum_k w_k tau_k is elected, plus where the sum is zero (as mergekit; the original falls back to the sign
    most frequent in the whole model). out = the sum of the w_k tau_k that agree with it, or, with `mean`, that sum
    divided by the weights of those that agree and are not zero. Overwrites tau_EN with w_k tau_k.
    """
    elected = np.empty(STRIP, np.bool_)
    for start in range(0, out_N.size, STRIP):
        out_S = out_N[start : start + STRIP]
        out_S[:] = np.float32(0)
        for k in range(len(weights_E)):
            tau_S, weight = tau_EN[k, start : start + STRIP], weights_E[k]
            for i in range(out_S.size):
                tau_S[i] *= weight
                out_S[i] += tau_S[i]
        for i in range(out_S.size):
            elected[i] = out_S[i] >= np.float32(0)
            out_S[i] = np.float32(0)
        for k in range(len(weights_E)):
            tau_S = tau_EN[k, start : start + STRIP]
            for i in range(out_S.size):
                out_S[i] += tau_S[i] if (tau_S[i] >= np.float32(0)) == elected[i] else np.float32(0)
        if mean:
            _divide_by_agreement(tau_EN, start, weights_E, elected, out_S)


@kernel
def keep_elected(tau_EN: np.ndarray, weights_E: np.ndarray) -> None:
    """Zero what disagrees with the elected sign, in place; the sum of w_k tau_k is then `elected_sum`'s."""
    mass = np.empty(STRIP, np.float32)
    for start in range(0, tau_EN.shape[1], STRIP):
        count = min(STRIP, tau_EN.shape[1] - start)
        mass[:] = np.float32(0)
        for k in range(len(weights_E)):
            tau_S, weight = tau_EN[k, start : start + count], weights_E[k]
            for i in range(count):
                mass[i] += weight * tau_S[i]
        for k in range(len(weights_E)):
            tau_S, weight = tau_EN[k, start : start + count], weights_E[k]
            for i in range(count):
                if (weight * tau_S[i] >= np.float32(0)) != (mass[i] >= np.float32(0)):
                    tau_S[i] = np.float32(0)


@kernel
def _divide_by_agreement(tau_EN: np.ndarray, start: int, weights_E: np.ndarray, elected: np.ndarray, out_S: np.ndarray) -> None:
    mass = np.zeros(STRIP, np.float32)
    for k in range(len(weights_E)):
        tau_S, weight = tau_EN[k, start : start + STRIP], weights_E[k]
        for i in range(out_S.size):
            agrees = (tau_S[i] != np.float32(0)) and ((tau_S[i] >= np.float32(0)) == elected[i])
            mass[i] += weight if agrees else np.float32(0)
    for i in range(out_S.size):
        out_S[i] = out_S[i] / mass[i] if mass[i] != np.float32(0) else np.float32(0)
