"""Gates in closed form from sums over router inputs. Shapes: L layers, E experts, H hidden."""

from __future__ import annotations

from typing import Literal

import numpy as np

from moerge.routers.base import Positive, Temperature
from moerge.routers.calibrated import CalibratedRouter

Normalize = Literal["columns", "joint", "none"]
"""`columns`: every expert's column of W gets norm 1 (DUME). `joint`: W without what all columns share, at a mean square norm
of 1, so that experts keep their relative strengths. `none`: W as it is, which predicts 0 or 1."""


def ridge(gram_HH: np.ndarray, targets_HE: np.ndarray, penalty: float) -> np.ndarray:
    """W = (A + lambda I)^-1 b with lambda = `penalty` times the mean of A's diagonal, as [E, H] in float64."""
    gram_HH = gram_HH.astype(np.float64)
    size = len(gram_HH)
    strength = penalty * np.trace(gram_HH) / size
    weights_HE: np.ndarray = np.linalg.solve(gram_HH + strength * np.eye(size), targets_HE.astype(np.float64))
    return weights_HE.T


def normalize_gate(weights_EH: np.ndarray, normalize: Normalize, temperature: float) -> np.ndarray:
    """A float32 gate whose logits are W x, normalized, over `temperature`. What is zero stays zero."""
    if normalize == "joint":
        weights_EH = weights_EH - weights_EH.mean(axis=0)
    norms_E1 = np.linalg.norm(weights_EH, axis=1, keepdims=True)
    if normalize == "joint":
        norms_E1 = np.sqrt(np.mean(norms_E1**2, keepdims=True))
    if normalize == "none":
        norms_E1 = np.ones_like(norms_E1)
    return (weights_EH / np.where(norms_E1 > 0, norms_E1, 1) / temperature).astype(np.float32)


class RegressionRouter(CalibratedRouter):
    """W = (A + lambda I)^-1 b, with A the sum of x^T x over router inputs x and b that of x^T y over targets y, layer by layer.

    lambda is `penalty` times the mean of A's diagonal. `balance` gives every expert's text the same weight, however long it is;
    false counts tokens. W's columns are normalized as `normalize` says and logits divided by `temperature`.
    """

    penalty: Positive = 0.01
    normalize: Normalize = "columns"
    temperature: Temperature = 0.1
    balance: bool = True

    def share(self, tokens: int) -> float:
        """Return the weight of a text of an expert with that many tokens of text."""
        return 1 / tokens if self.balance else 1.0

    def solve(self, gram_HH: np.ndarray, targets_HE: np.ndarray) -> np.ndarray:
        """One layer's gate, float32 [experts, hidden]."""
        return normalize_gate(ridge(gram_HH, targets_HE, self.penalty), self.normalize, self.temperature)
