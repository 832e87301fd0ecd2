"""A linear map of states that makes one head say what another says: the least divergence over the states of some text.

Shapes: S states, P of a panel, D their width (with a constant 1 at the end), M the shared width, K tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moerge.projectors.least_squares import Map
from moerge.tensors.linalg import log_softmax

PANEL = 256
"""States of a product that are computed together: the same whatever the threads."""
STEPS, INNER = 8, 6
"""Newton steps at most, and steps of conjugate gradients that approximate each."""
SHRINKAGE = 1e-4
"""What is added to the preconditioners' diagonals, relative to their means."""
SHARES, WORTH = (1.0, 0.5, 0.25), 1e-3
"""How much of a step is tried, and the share of the divergence that another step should have gained."""


@dataclass(frozen=True, eq=False)
class HeadMatching:
    """The heads to match on some states: log p [S, K], by softmax(H W h + bias) of the shared head [K, M] and its bias."""

    shared_KM: np.ndarray
    bias_K: np.ndarray
    state_SD: np.ndarray
    log_p_SK: np.ndarray
    map_panels: Map = map

    def divergence(self, change_MD: np.ndarray) -> float:
        """Mean KL(p || q) over the states in nats, given W."""
        total_S = np.empty(len(self.state_SD))

        def panel(start: int) -> None:
            part = slice(start, start + PANEL)
            log_q_PK = self._log_q(change_MD, part)
            log_p_PK = self.log_p_SK[part]
            total_S[part] = (np.exp(log_p_PK) * (log_p_PK - log_q_PK)).sum(axis=1)

        self._each(panel)
        return float(total_S.mean())

    def gradient(self, change_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gradient [M, D], and q [S, K], at which the curvature is taken."""
        q_SK = np.empty_like(self.log_p_SK)
        error_SM = np.empty((len(q_SK), self.shared_KM.shape[1]))

        def panel(start: int) -> None:
            part = slice(start, start + PANEL)
            q_SK[part] = np.exp(self._log_q(change_MD, part))
            error_SM[part] = (q_SK[part] - np.exp(self.log_p_SK[part])) @ self.shared_KM

        self._each(panel)
        return error_SM.T @ self.state_SD / len(q_SK), q_SK

    def hessian_vector_product(self, direction_MD: np.ndarray, q_SK: np.ndarray) -> np.ndarray:
        """The Gauss-Newton curvature (which for a linear map is the whole) times a direction, [M, D]."""
        moved_SM = self.state_SD @ direction_MD.T
        hvp_SM = np.empty_like(moved_SM)

        def panel(start: int) -> None:
            part = slice(start, start + PANEL)
            logit_PK = moved_SM[part] @ self.shared_KM.T
            logit_PK -= (q_SK[part] * logit_PK).sum(axis=1, keepdims=True)
            hvp_SM[part] = (q_SK[part] * logit_PK) @ self.shared_KM

        self._each(panel)
        product_MD: np.ndarray = hvp_SM.T @ self.state_SD / len(q_SK)
        return product_MD

    def _log_q(self, change_MD: np.ndarray, part: slice) -> np.ndarray:
        return log_softmax((self.state_SD[part] @ change_MD.T) @ self.shared_KM.T + self.bias_K)

    def _each(self, panel: Callable[[int], None]) -> None:
        for _ in self.map_panels(panel, range(0, len(self.state_SD), PANEL)):
            pass


def least_divergence(
    heads: HeadMatching,
    held_out: HeadMatching,
    start_MD: np.ndarray,
    moment_MM: np.ndarray,
    stepped: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """From `start_MD`, Newton steps for as long as the divergence on held-out states falls; `stepped` is called after each.

    Each is solved by a few steps of conjugate gradients, with the second moments of the shared head's rows (`moment_MM`) and of
    the states as preconditioner: the curvature itself, if probabilities did not depend on the state.
    """
    left_MM = np.linalg.inv(_shrunk(moment_MM))
    right_DD = np.linalg.inv(_shrunk((heads.state_SD.T @ heads.state_SD / len(heads.state_SD)).astype(np.float64)))
    best_MD, best = start_MD, held_out.divergence(start_MD)
    for _ in range(STEPS):
        step_MD = _newton_step(heads, best_MD, left_MM, right_DD)
        stepped()
        tried = [(held_out.divergence(best_MD + share * step_MD), share) for share in SHARES]
        least, share = min(tried)
        if not least < best:
            break
        gained, best, best_MD = best - least, least, best_MD + share * step_MD
        if gained < WORTH * best:
            break
    return best_MD


def _newton_step(heads: HeadMatching, from_MD: np.ndarray, left_MM: np.ndarray, right_DD: np.ndarray) -> np.ndarray:
    gradient_MD, q_SK = heads.gradient(from_MD)
    step_MD, residual_MD = np.zeros_like(gradient_MD), -gradient_MD
    direction_MD, size = np.zeros_like(gradient_MD), 1.0
    for _ in range(INNER):
        preconditioned_MD = left_MM @ residual_MD @ right_DD
        size, before = float((residual_MD * preconditioned_MD).sum()), size
        direction_MD = preconditioned_MD + size / before * direction_MD
        hvp_MD = heads.hessian_vector_product(direction_MD, q_SK)
        curvature = float((direction_MD * hvp_MD).sum())
        if not curvature > 0:  # nothing is left to gain
            break
        step_MD = step_MD + size / curvature * direction_MD
        residual_MD = residual_MD - size / curvature * hvp_MD
    return step_MD


def _shrunk(moment_MM: np.ndarray) -> np.ndarray:
    shrunk_MM: np.ndarray = moment_MM + SHRINKAGE * np.trace(moment_MM) / len(moment_MM) * np.eye(len(moment_MM))
    return shrunk_MM
