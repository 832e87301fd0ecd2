"""A router fitted to the routing of another, without training: Newton's method on a convex divergence.

Shapes: T tokens, D width, E experts that are left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moerge.tensors.linalg import conjugate_gradients

_NEWTON_STEPS, _CG_STEPS, _HALVINGS = 20, 200, 20
_TOLERANCE = 1e-6
_DAMPING = 1e-4
"""Added to the curvature, as a share of its mean: the common shift of all rows changes no probability."""
HELDOUT = 10
"""Every so many-th token is not fitted to but decides which step counts."""


class RouterFit(NamedTuple):
    """Rows of a router, and its mean divergence from the target on held-out tokens before and after, in nats."""

    weight_ED: np.ndarray
    before: float
    after: float


def fit_router(start_ED: np.ndarray, inputs_TD: np.ndarray, target_TE: np.ndarray) -> RouterFit:
    """Minimise the mean over tokens of KL(target || softmax(W x)) over W from `start_ED` on.

    The Hessian's product with V is Y^T X / T with Z = X V^T, S = softmax(X W^T), Y = S * Z - S * rowsum(S * Z), as in HARC
    (arXiv 2606.03391), taken anew in each step. The step that is best on held-out tokens counts, the start among them.
    """
    inputs_TD, target_TE = inputs_TD.astype(np.float64), target_TE.astype(np.float64)
    aside_T = (
        np.arange(len(inputs_TD)) % HELDOUT == HELDOUT - 1 if len(inputs_TD) >= 2 * HELDOUT else np.zeros(len(inputs_TD), bool)
    )
    seen_TD, goal_TE = inputs_TD[~aside_T], target_TE[~aside_T]
    judged_TD, judge_TE = (inputs_TD[aside_T], target_TE[aside_T]) if aside_T.any() else (seen_TD, goal_TE)
    weight_ED = start_ED.astype(np.float64)
    before = divergence(weight_ED, judged_TD, judge_TE)
    best, lowest = weight_ED, before
    for _ in range(_NEWTON_STEPS):
        step_ED = _newton_step(weight_ED, seen_TD, goal_TE)
        weight_ED, done = _line_search(weight_ED, step_ED, seen_TD, goal_TE)
        loss = divergence(weight_ED, judged_TD, judge_TE)
        if loss < lowest:
            best, lowest = weight_ED, loss
        if done:
            break
    return RouterFit(best, before, lowest)


def softmax(logits_TE: np.ndarray) -> np.ndarray:
    """Probabilities, row by row."""
    raised_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    return np.asarray(raised_TE / raised_TE.sum(axis=1, keepdims=True))


def divergence(weight_ED: np.ndarray, inputs_TD: np.ndarray, target_TE: np.ndarray) -> float:
    """The mean over tokens of KL(target || softmax(W x)), in nats."""
    logits_TE = inputs_TD @ weight_ED.T
    logits_TE -= logits_TE.max(axis=1, keepdims=True)
    log_TE = logits_TE - np.log(np.exp(logits_TE).sum(axis=1, keepdims=True))
    entropy_TE = np.where(target_TE > 0, target_TE * np.log(np.where(target_TE > 0, target_TE, 1)), 0)
    return float((entropy_TE - target_TE * log_TE).sum(axis=1).mean())


def gradient(weight_ED: np.ndarray, inputs_TD: np.ndarray, target_TE: np.ndarray) -> np.ndarray:
    """The gradient of `divergence` in W, [E, D]."""
    rest_TE = softmax(inputs_TD @ weight_ED.T) * target_TE.sum(axis=1, keepdims=True) - target_TE
    return np.asarray(rest_TE.T @ inputs_TD / len(inputs_TD))


def _newton_step(weight_ED: np.ndarray, inputs_TD: np.ndarray, target_TE: np.ndarray) -> np.ndarray:
    """Conjugate gradients on the damped Newton equation."""
    share_TE = softmax(inputs_TD @ weight_ED.T)
    curvature = float((share_TE * (1 - share_TE)).sum(axis=1) @ (inputs_TD**2).sum(axis=1)) / len(inputs_TD) / weight_ED.size
    damping = _DAMPING * curvature + np.finfo(float).tiny

    def product(step_ED: np.ndarray) -> np.ndarray:
        mixed_TE = share_TE * (inputs_TD @ step_ED.T)
        mixed_TE -= share_TE * mixed_TE.sum(axis=1, keepdims=True)
        return np.asarray(mixed_TE.T @ inputs_TD / len(inputs_TD) + damping * step_ED)

    return conjugate_gradients(product, -gradient(weight_ED, inputs_TD, target_TE), _CG_STEPS)


def _line_search(
    weight_ED: np.ndarray, step_ED: np.ndarray, inputs_TD: np.ndarray, target_TE: np.ndarray
) -> tuple[np.ndarray, bool]:
    """The longest of the halved steps that lowers the divergence; and True where it lowers it no more."""
    before = divergence(weight_ED, inputs_TD, target_TE)
    for halving in range(_HALVINGS):
        moved_ED = weight_ED + 0.5**halving * step_ED
        loss = divergence(moved_ED, inputs_TD, target_TE)
        if loss < before:
            return moved_ED, before - loss < _TOLERANCE * max(before, _TOLERANCE)
    return weight_ED, True
