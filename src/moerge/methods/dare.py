"""DARE."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from moerge.methods.formulas import elected_sum, weighted_sum
from moerge.methods.method import Block, Density, TaskVectorMethod
from moerge.methods.random import drop


class Dare(TaskVectorMethod):
    """Drop entries of each task vector at random, rescale the rest (Yu et al. 2024; MergeME, section 3.1.2 and appendix A).

    An entry is kept with probability `density` and divided by it, so that the expected task vector is unchanged
    (`rescale: false` leaves that out). `elect: none` adds the task vectors up, `elect: sign` lets TIES' election choose
    among them first, and `aggregate` then sums or averages those that agree.
    mergekit's dare_linear is `elect: none` and its dare_ties `elect: sign`, but mergekit restores each tensor's L1 norm
    instead of dividing by the density, which is biased on sparse task vectors.

    Not for task vectors with large entries (above about 0.03, says the paper): dropping those loses what was learned.
    """

    name: ClassVar[str] = "dare"
    density: Density = 0.8
    rescale: bool = True
    elect: Literal["none", "sign"] = "none"
    aggregate: Literal["sum", "mean"] = "sum"
    seed: int = 0

    @property
    def random_seed(self) -> int:
        """The seed of the masks."""
        return self.seed

    @property
    def divides_by_weights(self) -> bool:
        """True for the mean of all task vectors; an elected mean divides by the weights of those that agree."""
        return self.aggregate == "mean" and self.elect == "none"

    def combine(self, block: Block) -> None:
        """Drop, rescale, then sum."""
        factor = np.float32(1 / self.density if self.rescale else 1)
        drop(block.theta_KN, block.keys_K, block.start, self.density, factor)
        if self.elect == "sign":
            elected_sum(block.theta_KN, block.weights_K, self.aggregate == "mean", block.out_N)
            return
        divisor = block.weights_K.sum(dtype=np.float64) if self.aggregate == "mean" else 1
        weighted_sum(block.theta_KN, block.weights_K, np.float32(divisor), block.out_N)
