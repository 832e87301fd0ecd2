"""Weights by Nash bargaining between task vectors. Shapes: E task vectors, N elements."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal, Self

import numpy as np

from moerge.errors import InputError
from moerge.methods.formulas import weighted_sum
from moerge.methods.method import Block, Finite, Measurement, Statistic, TaskVectorMethod
from moerge.methods.products import LANES, add_products

_CONVERGED, _MOST_STEPS = 1e-12, 500
_CONFLICT = 1e-2
"""A convex combination of unit task vectors with a smaller norm is zero but for the rounding of stored weights."""


class Nash(TaskVectorMethod):
    """theta = theta_base + scale * s * sum_k alpha_k tau_k, alpha > 0 with (G alpha)_k = 1 / alpha_k, G_jk = tau_j . tau_k.

    The direction is the Nash bargaining solution: it maximises sum_k log(Delta . tau_k) over a ball, so it agrees with every
    task vector, and one that is there twice counts for less than two (NAMEx, Nguyen et al. 2025, arXiv 2510.16138; Nash-MTL,
    Navon et al. 2022). Its length is always sqrt(E), which means nothing for weights. With `length: mean` s = 1 / sum_k alpha_k:
    a weighted mean of the task vectors, for orthogonal ones of one length their average. With `length: sum` s makes it as long
    as the plain sum of task vectors. One solution spans the model, a role in all layers or a tensor, as `scope` says; tensors
    whose overrides set another `group` are solved apart.

    Not where the base is the experts' own mean, or task vectors cancel in another way: no direction agrees with all, which is
    refused. Not for NAMEx's training with momentum: this is its merge alone.
    """

    name: ClassVar[str] = "nash"
    uses_weights: ClassVar[bool] = False
    scale: Finite = 1.0
    scope: Literal["tensor", "role", "model"] = "model"
    length: Literal["mean", "sum"] = "mean"
    group: str = "all"

    @property
    def measures(self) -> int:
        """One pass."""
        return 1

    @property
    def spans_model(self) -> bool:
        """False with `scope: tensor`."""
        return self.scope != "tensor"

    @property
    def measured_as(self) -> Nash:
        """Return the method with scale 1: the solution is the same."""
        return self.model_copy(update={"scale": 1.0})

    def for_role(self, role: str) -> Self:
        """The method with a group for each role, with `scope: role`."""
        parts = [part for part in role.split(".") if part != "layers" and not part.isdecimal()]
        return self.model_copy(update={"group": f"{self.group} {'.'.join(parts)}"}) if self.scope == "role" else self

    def measure(self, experts: int, size: int) -> Measurement:
        """The factor of each task vector, float32 [E]."""
        products_EEL = yield Statistic(partial(np.zeros, (experts, experts, LANES)), add_products)
        products_EE = products_EEL.sum(axis=2)
        gram_EE = np.triu(products_EE) + np.triu(products_EE, 1).T
        alpha_E = bargain(gram_EE)
        if self.length == "mean":
            return (alpha_E / max(float(alpha_E.sum()), np.finfo(float).tiny)).astype(np.float32)
        own, wanted = (float(np.sqrt(max(0.0, w_E @ gram_EE @ w_E))) for w_E in (alpha_E, np.ones(experts)))
        return (alpha_E * (wanted / own if own else 0.0)).astype(np.float32)

    def combine(self, block: Block) -> None:
        """The weighted sum."""
        weighted_sum(block.theta_EN, block.statistic, np.float32(1), block.out_N)


def bargain(gram_EE: np.ndarray) -> np.ndarray:
    """alpha > 0 with alpha_k (G alpha)_k = 1 for a Gram matrix; 0 for vectors that are zero.

    It minimises 1/2 a^T C a - sum log a, C the correlations, a = alpha * norms: strictly convex and self-concordant, so damped
    Newton steps stay positive and converge. Raises InputError where some non-negative combination of the vectors is zero: then
    there is no minimum.
    """
    norms_E = np.sqrt(np.diagonal(gram_EE))
    there = np.flatnonzero(norms_E > 0)
    alpha_E = np.zeros(len(gram_EE))
    if there.size:
        correlations_EE = gram_EE[np.ix_(there, there)] / np.outer(norms_E[there], norms_E[there])
        alpha_E[there] = _minimum(correlations_EE) / norms_E[there]
    return alpha_E


def _minimum(correlations_EE: np.ndarray) -> np.ndarray:
    a_E = np.full(len(correlations_EE), len(correlations_EE) ** -0.5)
    for _ in range(_MOST_STEPS):
        gradient_E = correlations_EE @ a_E - 1 / a_E
        step_E = np.linalg.solve(correlations_EE + np.diag(a_E**-2.0), gradient_E)
        decrement = float(np.sqrt(max(0.0, gradient_E @ step_E)))
        a_E = a_E - step_E * (1 if decrement < 1 / 4 else 1 / (1 + decrement))
        share_E = a_E / a_E.sum()
        if share_E @ correlations_EE @ share_E < _CONFLICT**2:
            break
        if decrement < _CONVERGED:
            return np.asarray(a_E)
    raise InputError(
        "nash: the experts' task vectors cancel (a non-negative combination of them is zero), so no direction agrees with all: "
        "name the base that they were trained from, not their mean; 'scope: model' asks for less than 'tensor'; or another method"
    )
