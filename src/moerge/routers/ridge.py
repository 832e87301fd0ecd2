"""DUME's router: which expert's text is this token from, by ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from moerge.operations.fitter import FitContext
from moerge.routers.calibrated import MomentRouter, gates_by_name
from moerge.routers.moments import GramStatistics
from moerge.routers.regression import RegressionRouter


class RidgeRouter(RegressionRouter, MomentRouter):
    """W = (A + lambda I)^-1 b, with A the sum of x^T x and b that of x^T onehot(expert) over all experts' text, layer by layer.

    DUME (Fanì and Ersoy 2026, arXiv 2603.29765): x is the router's input while each text runs through its own expert, the
    columns of W get unit norm and logits are divided by a `temperature` of 0.1. Where this differs:

    - lambda is `penalty` times the mean of A's diagonal, so that it means the same whatever the amount of text, the width and
      the norms; DUME's 0.01 is absolute, next to nothing for its amounts of text.
    - Mixtral's gates have no bias, so the regression has none either: W is then the best gate without one. Fitting [x, 1] and
      dropping the bias is worse, since it shifts every decision by what the bias had corrected. Little is lost: normalized
      states have a large common part, by which W can express a constant.
    - `balance` gives every expert's text the same weight however long it is; false counts tokens, as DUME does.
    """

    kind: ClassVar[str] = "ridge"

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """One regression a layer."""
        moments_E = self.moments(context)
        return gates_by_name(context, lambda layer: self.gate(moments_E, layer))

    def gate(self, moments_E: Sequence[GramStatistics], layer: int) -> np.ndarray:
        """One layer's gate, float32 [experts, hidden], from every expert's statistics."""
        shares = [self.share(moments.tokens) for moments in moments_E]
        gram_HH = sum(share * m.gram_LHH[layer].astype(np.float64) for share, m in zip(shares, moments_E, strict=True))
        targets_EH = [share * m.sum_LH[layer].astype(np.float64) for share, m in zip(shares, moments_E, strict=True)]
        return self.solve(np.asarray(gram_HH), np.stack(targets_EH, axis=1))
