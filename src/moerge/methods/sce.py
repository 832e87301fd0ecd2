"""SCE."""

from __future__ import annotations

from collections.abc import Generator
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import numpy as np

from moerge.methods.formulas import keep_elected
from moerge.methods.magnitude import magnitudes_at
from moerge.methods.method import Block, Finite, Measurement, Statistic, TaskVectorMethod
from moerge.methods.products import LANES
from moerge.methods.values import Proportion
from moerge.tensors.kernels import STRIP, kernel


class Sce(TaskVectorMethod):
    """Select, calculate, erase (Wan et al. 2024, *FuseChat*, section 3.3): theta = theta_base + scale * tau, tau by tensor.

    Select the `select_topk` fraction of entries whose variance over experts is largest (of those where it is not zero), the
    others become zero. Calculate eta_k = sum tau_k^2 / sum_j sum tau_j^2 over what is selected. Erase the entries that disagree
    with the sign of sum_k tau_k. tau = sum_k eta_k tau_k / sum_k eta_k, both over the experts that are left at an entry.
    mergekit's sce is the same, but takes equal eta where sum_j mean(tau_j^2) is below 1e-6, as it is for most fine-tuned
    models. FuseAI's code uses the selection for eta only and merges unselected entries too. Entries whose variance equals the
    smallest selected are all selected.

    Not for a single expert unless `select_topk` is 1: its variance is zero everywhere, so nothing is selected.
    """

    name: ClassVar[str] = "sce"
    uses_weights: ClassVar[bool] = False
    scale: Finite = 1.0
    select_topk: Proportion = 1.0

    @property
    def measures(self) -> int:
        """One pass for eta, and up to three to select."""
        return 1 if self.select_topk == 1 else 4

    def measure(self, experts: int, size: int) -> Measurement:
        """The smallest variance selected, and eta, float32 [E]."""
        threshold = (yield from self._select(size)) if self.select_topk < 1 else np.float32(0)
        energies_EL = yield Statistic(partial(np.zeros, (experts, LANES)), partial(_add_energies, threshold))
        energies_E = energies_EL.sum(axis=1)
        total = energies_E.sum()
        return threshold, (energies_E / total if total > 0 else energies_E).astype(np.float32)

    def _select(self, size: int) -> Generator[Statistic, Any, np.float32]:
        nonzero = yield Statistic(partial(np.zeros, 1, np.int64), _count_varying)
        selected = int(Fraction(str(self.select_topk)) * int(nonzero[0]))
        if selected == 0:
            return np.float32(np.inf)
        steps, total = magnitudes_at([(0, selected)], 1, size), None
        while True:
            try:
                statistic = steps.send(total)
            except StopIteration as finished:
                threshold: np.float32 = finished.value[0]
                return threshold
            total = yield Statistic(statistic.zeros, partial(_add_variances, statistic), statistic.runs)

    def combine(self, block: Block) -> None:
        """Select, erase, and average by eta."""
        threshold, eta_E = block.statistic
        if self.select_topk < 1:
            block.theta_EN[:, variance(block.theta_EN) < threshold] = 0
        keep_elected(block.theta_EN, np.ones_like(eta_E))
        _mean_of_nonzero(block.theta_EN, eta_E, block.out_N)


def variance(tau_EN: np.ndarray) -> np.ndarray:
    """The variance over experts, of all of them (not of a sample), float32 [N]."""
    out_N = np.empty(tau_EN.shape[1], np.float32)
    _variance(tau_EN, out_N)
    return out_N


def _add_variances(statistic: Statistic, tau_EN: np.ndarray, total: Any) -> None:
    statistic.add(variance(tau_EN)[None], total)


def _count_varying(tau_EN: np.ndarray, total: np.ndarray) -> None:
    total += np.count_nonzero(variance(tau_EN))


def _add_energies(threshold: np.float32, tau_EN: np.ndarray, total_EL: np.ndarray) -> None:
    _energies(tau_EN, variance(tau_EN), threshold, total_EL)


@kernel
def _variance(tau_EN: np.ndarray, out_N: np.ndarray) -> None:
    experts = np.float32(len(tau_EN))
    mean = np.empty(STRIP, np.float32)
    for start in range(0, out_N.size, STRIP):
        out_S = out_N[start : start + STRIP]
        mean[:] = np.float32(0)
        for k in range(len(tau_EN)):
            tau_S = tau_EN[k, start : start + STRIP]
            for i in range(out_S.size):
                mean[i] += tau_S[i]
        for i in range(out_S.size):
            mean[i] /= experts
            out_S[i] = np.float32(0)
        for k in range(len(tau_EN)):
            tau_S = tau_EN[k, start : start + STRIP]
            for i in range(out_S.size):
                out_S[i] += (tau_S[i] - mean[i]) * (tau_S[i] - mean[i])
        for i in range(out_S.size):
            out_S[i] /= experts


@kernel
def _energies(tau_EN: np.ndarray, variance_N: np.ndarray, threshold: np.float32, total_EL: np.ndarray) -> None:
    size = variance_N.size
    whole = size - size % LANES
    for k in range(len(tau_EN)):
        tau_N, total_L = tau_EN[k], total_EL[k]
        for start in range(0, whole, LANES):
            for lane in range(LANES):
                tau = np.float64(tau_N[start + lane])
                total_L[lane] += tau * tau if variance_N[start + lane] >= threshold else 0.0
        for i in range(whole, size):
            tau = np.float64(tau_N[i])
            total_L[0] += tau * tau if variance_N[i] >= threshold else 0.0


@kernel
def _mean_of_nonzero(tau_EN: np.ndarray, weights_E: np.ndarray, out_N: np.ndarray) -> None:
    mass = np.empty(STRIP, np.float32)
    for start in range(0, out_N.size, STRIP):
        out_S = out_N[start : start + STRIP]
        mass[:] = np.float32(0)
        out_S[:] = np.float32(0)
        for k in range(len(weights_E)):
            tau_S, weight = tau_EN[k, start : start + STRIP], weights_E[k]
            for i in range(out_S.size):
                out_S[i] += weight * tau_S[i]
                mass[i] += weight if tau_S[i] != np.float32(0) else np.float32(0)
        for i in range(out_S.size):
            out_S[i] = out_S[i] / mass[i] if mass[i] != np.float32(0) else np.float32(0)
