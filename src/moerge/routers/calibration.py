"""Routers of a merged mixture, fitted to the routing of the mixtures that it was merged from (HARC).

Huang et al., *When Model Merging Breaks Routing* (arXiv 2606.03391). For one layer, over the router inputs x of the merged model:

    minimise over W   sum over sources d of  1/T_d  sum over x of  KL( softmax(W_d x) || softmax(W x) )

The paper takes one step: the KL's second-order expansion at each source's own logits, whose normal equations A(W) = B are solved
by conjugate gradients without forming A. Here Newton steps on the KL itself follow, which is convex, so each can only lower it.

Shapes: E experts, H hidden, T tokens, D sources. Products are in float32 blocks, sums in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moerge.tensors.linalg import conjugate_gradients

_BLOCK = 4096
"""Tokens whose logits are in memory at a time."""
_SHRINK = 0.9
"""HARC's gamma: the share of A that counts as it is; of the rest only the diagonal does."""
_HALVINGS = 20
_ARMIJO = 1e-4


@dataclass(frozen=True)
class Routed:
    """A source's router inputs `states_TH` in the merged model, and its own router `gate_EH`."""

    states_TH: np.ndarray
    gate_EH: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """The mean KL from a source's routing to the merged router's, and the share of tokens with the same `top_k` experts."""

    kl: float
    overlap: float


def fit_gate(sources: Sequence[Routed], start_EH: np.ndarray, *, newton: int = 3, iterations: int = 100) -> np.ndarray:
    """A router that routes as the sources do, each on its own inputs.

    Args:
        sources: Inputs and routers of the mixtures that were merged.
        start_EH: The router to start from; its part that no softmax sees (one vector added to every row) stays.
        newton: Newton steps after HARC's own.
        iterations: Steps of conjugate gradients in each, at most.

    Returns:
        The router in float64; its KL is never above the start's.
    """
    gate_EH = start_EH.astype(np.float64)
    step_EH = conjugate_gradients(
        partial(_harc_product, sources), _harc_product(sources, gate_EH, against_sources=True), iterations
    )
    gate_EH = _descend(sources, gate_EH, step_EH)
    for _ in range(newton):
        gradient_EH = kl_gradient(sources, gate_EH)
        step_EH = conjugate_gradients(partial(kl_curvature, sources, gate_EH), -gradient_EH, iterations)
        if float((step_EH * gradient_EH).sum()) >= 0:
            break
        gate_EH = _descend(sources, gate_EH, step_EH)
    return gate_EH


def agreement(source: Routed, gate_EH: np.ndarray, top_k: int) -> Agreement:
    """Compare a router's decisions with a source's own."""
    kl, same = 0.0, 0
    for states_TH in _blocks(source.states_TH):
        own_TE, other_TE = _logits(states_TH, source.gate_EH), _logits(states_TH, gate_EH)
        kl += float((np.exp(_log_softmax(own_TE)) * (_log_softmax(own_TE) - _log_softmax(other_TE))).sum())
        same += int((_chosen(own_TE, top_k) == _chosen(other_TE, top_k)).all(axis=1).sum())
    tokens = len(source.states_TH)
    return Agreement(kl / tokens, same / tokens)


def divergence(sources: Sequence[Routed], gate_EH: np.ndarray) -> float:
    """The objective: the sources' mean KLs, added up."""
    return sum(agreement(source, gate_EH, 1).kl for source in sources)


def kl_gradient(sources: Sequence[Routed], gate_EH: np.ndarray) -> np.ndarray:
    """Its gradient: sum_d 1/T_d sum_x (softmax(W x) - softmax(W_d x)) x^T."""
    total_EH = np.zeros(gate_EH.shape)
    for source in sources:
        for states_TH in _blocks(source.states_TH):
            apart_TE = _softmax(_logits(states_TH, gate_EH)) - _softmax(_logits(states_TH, source.gate_EH))
            total_EH += apart_TE.T @ states_TH / len(source.states_TH)
    return total_EH


def kl_curvature(sources: Sequence[Routed], gate_EH: np.ndarray, direction_EH: np.ndarray) -> np.ndarray:
    """Its Hessian at W times a direction: sum_d 1/T_d sum_x (diag(p) - p p^T) V x x^T, p = softmax(W x)."""
    return _product([(source.states_TH, gate_EH) for source in sources], direction_EH)


def _harc_product(sources: Sequence[Routed], gate_EH: np.ndarray, *, against_sources: bool = False) -> np.ndarray:
    """HARC's A(W), shrunk; with `against_sources` instead B - A(W), what a step from W has to make up for."""
    total_EH = np.zeros(gate_EH.shape)
    for source in sources:
        moved_EH = source.gate_EH.astype(np.float64) - gate_EH if against_sources else gate_EH
        places = [(source.states_TH, source.gate_EH)]
        total_EH += _SHRINK * _product(places, moved_EH) + (1 - _SHRINK) * _diagonal(source) * moved_EH
    return total_EH


def _diagonal(source: Routed) -> np.ndarray:
    """The diagonal of A: sum_x p_i (1 - p_i) x_j^2 over T."""
    total_EH = np.zeros(source.gate_EH.shape)
    for states_TH in _blocks(source.states_TH):
        p_TE = _softmax(_logits(states_TH, source.gate_EH))
        total_EH += (p_TE * (1 - p_TE)).T @ states_TH**2 / len(source.states_TH)
    return total_EH


def _product(places: Sequence[tuple[np.ndarray, np.ndarray]], direction_EH: np.ndarray) -> np.ndarray:
    total_EH = np.zeros(direction_EH.shape)
    for every_TH, gate_EH in places:
        for states_TH in _blocks(every_TH):
            p_TE, z_TE = _softmax(_logits(states_TH, gate_EH)), states_TH @ direction_EH.T
            weighted_TE = p_TE * z_TE
            total_EH += (weighted_TE - p_TE * weighted_TE.sum(axis=1, keepdims=True)).T @ states_TH / len(every_TH)
    return total_EH


def _descend(sources: Sequence[Routed], gate_EH: np.ndarray, step_EH: np.ndarray) -> np.ndarray:
    """The longest of the steps 1, 1/2, 1/4, ... that lowers the KL enough, or none; without what no softmax sees."""
    step_EH = step_EH - step_EH.mean(axis=0)
    before, slope = divergence(sources, gate_EH), float((kl_gradient(sources, gate_EH) * step_EH).sum())
    for halving in range(_HALVINGS):
        share = 0.5**halving
        if divergence(sources, gate_EH + share * step_EH) <= before + _ARMIJO * share * min(0.0, slope):
            return gate_EH + share * step_EH
    return gate_EH


def _blocks(states_TH: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(states_TH), _BLOCK):
        yield states_TH[start : start + _BLOCK].astype(np.float64)


def _logits(states_TH: np.ndarray, gate_EH: np.ndarray) -> np.ndarray:
    logits_TE: np.ndarray = states_TH @ gate_EH.T.astype(np.float64)
    return logits_TE


def _log_softmax(logits_TE: np.ndarray) -> np.ndarray:
    shifted_TE = logits_TE - logits_TE.max(axis=1, keepdims=True)
    return np.asarray(shifted_TE - np.log(np.exp(shifted_TE).sum(axis=1, keepdims=True)))


def _softmax(logits_TE: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(_log_softmax(logits_TE)))


def _chosen(logits_TE: np.ndarray, top_k: int) -> np.ndarray:
    """The set of a token's chosen experts, as a row of marks."""
    marks_TE = np.zeros(logits_TE.shape, bool)
    np.put_along_axis(marks_TE, np.argsort(-logits_TE, axis=1, kind="stable")[:, :top_k], True, axis=1)
    return marks_TE
