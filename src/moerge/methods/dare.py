"""DARE."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moerge.methods.method import Block
from moerge.methods.sparse import ElectiveMethod
from moerge.methods.values import each
from moerge.tensors.random import drop


class Dare(ElectiveMethod):
    """Drop entries of each task vector at random, rescale the rest (Yu et al. 2024; MergeME, section 3.1.2 and appendix A).

    An entry is kept with probability `density` and divided by it, so that the expected task vector is unchanged
    (`rescale: false` leaves that out). `elect: none` adds the task vectors up, `elect: sign` lets TIES' election choose
    among them first, and `aggregate` then sums or averages those that agree.
    mergekit's dare_linear is `elect: none` and its dare_ties `elect: sign`, but mergekit restores each tensor's L1 norm
    instead of dividing by the density, which is biased on sparse task vectors.

    Not for task vectors with large entries (above about 0.03, says the paper): dropping those loses what was learned.
    """

    name: ClassVar[str] = "dare"
    rescale: bool = True
    seed: int = 0

    @property
    def random_seed(self) -> int:
        """The seed of the masks."""
        return self.seed

    def sparsify(self, block: Block) -> None:
        """Drop, and rescale what is kept."""
        for k, density in enumerate(each(self.density, len(block.theta_EN))):
            factor = np.float32(1 / density if self.rescale else 1)
            drop(block.theta_EN[k : k + 1], block.keys_E[k : k + 1], block.start, density, factor)
