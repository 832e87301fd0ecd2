"""Inner products of task vectors in float64, in one order of additions. Shapes: E experts, N elements."""

from __future__ import annotations

import numpy as np

from moerge.tensors.kernels import kernel

LANES = 16
"""Running sums side by side, so that the order of additions is fixed and loops still vectorise."""


@kernel
def add_products(tau_EN: np.ndarray, total_EEL: np.ndarray) -> None:
    """Add the products of each pair of rows j <= k to `total_EEL[j, k]`, whose lanes add up to them."""
    size = tau_EN.shape[1]
    whole = size - size % LANES
    for j in range(tau_EN.shape[0]):
        for k in range(j, tau_EN.shape[0]):
            first_N, second_N, total_L = tau_EN[j], tau_EN[k], total_EEL[j, k]
            for start in range(0, whole, LANES):
                for lane in range(LANES):
                    total_L[lane] += np.float64(first_N[start + lane]) * np.float64(second_N[start + lane])
            for i in range(whole, size):
                total_L[0] += np.float64(first_N[i]) * np.float64(second_N[i])
