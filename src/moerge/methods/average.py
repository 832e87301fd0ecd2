"""Averages of weights: no base, no task vectors."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moerge.methods.formulas import weighted_sum
from moerge.methods.method import Block, MergeMethod


class Average(MergeMethod):
    """theta = 1/E * sum_k theta_k (Wortsman et al. 2022, model soups; what BTX does to all that is not FFN).

    Not for experts that drifted far apart or disagree in sign: entries that cancel are lost.
    """

    name: ClassVar[str] = "average"
    uses_weights: ClassVar[bool] = False

    def merge(self, block: Block) -> None:
        """The mean over experts, summed in the recipe's order."""
        weighted_sum(block.theta_EN, np.ones_like(block.weights_E), np.float32(len(block.weights_E)), block.out_N)


class Linear(MergeMethod):
    """theta = sum_k w_k theta_k, divided by sum_k w_k unless `normalize` is off.

    Not normalized, weights that do not sum to 1 scale the whole model, norms and embeddings too: rarely what is meant.
    """

    name: ClassVar[str] = "linear"
    normalize: bool = True

    @property
    def divides_by_weights(self) -> bool:
        """True with `normalize`."""
        return self.normalize

    def merge(self, block: Block) -> None:
        """The weighted sum over experts, in the recipe's order."""
        total = np.float32(block.weights_E.sum(dtype=np.float64)) if self.normalize else np.float32(1)
        weighted_sum(block.theta_EN, block.weights_E, total, block.out_N)
