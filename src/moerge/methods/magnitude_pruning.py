"""Magnitude pruning."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moerge.methods.magnitude import magnitude_thresholds
from moerge.methods.method import Block, Measurement, Unit
from moerge.methods.sparse import ElectiveMethod, RowScope, keep_between, keep_ranks
from moerge.methods.values import each, numbers


class MagnitudePruning(ElectiveMethod):
    """theta = theta_base + scale * sum_k w_k prune(tau_k): each task vector keeps its `density` largest entries.

    The pruning that DARE and DELLA are compared with (Yu et al. 2024, section 3.2; Deep et al. 2024, section 4). `scope` is what
    a threshold spans: each `row` (FusionBench, DELLA's code), each `tensor` (MergeLM, mergekit) or the whole `model`. `rescale`
    divides what is kept by the density (MergeLM's option). Entries that equal the smallest kept one are all kept; MergeLM drops
    them all, mergekit takes some by sort order. With `elect: sign` it is TIES.

    Not at low densities without TIES' election where experts disagree in sign: large entries cancel.
    """

    name: ClassVar[str] = "magnitude_pruning"
    scope: RowScope = "tensor"
    rescale: bool = False

    @property
    def unit(self) -> Unit:
        """Rows with `scope: row`."""
        return "rows" if self.scope == "row" else "block"

    @property
    def measures(self) -> int:
        """Two passes, none for rows or where nothing is pruned."""
        return 2 if self.scope != "row" and min(numbers(self.density)) < 1 else 0

    @property
    def spans_model(self) -> bool:
        """True with `scope: model`."""
        return self.scope == "model" and self.measures > 0

    def measure(self, experts: int, size: int) -> Measurement:
        """The threshold of each expert."""
        return (yield from magnitude_thresholds(self.kept(experts, size), size))

    def sparsify(self, block: Block) -> None:
        """Prune, and rescale if that is asked for."""
        experts = len(block.theta_EN)
        if self.scope == "row":
            columns = block.shape[-1]
            keep_ranks(block.theta_EN, columns, [(1, kept) for kept in self.kept(experts, columns)])
        elif self.measures:
            keep_between(block.theta_EN, block.statistic, np.full_like(block.statistic, np.inf))
        if self.rescale:
            np.multiply(
                block.theta_EN,
                np.array([[1 / density] for density in each(self.density, experts)], np.float32),
                out=block.theta_EN,
            )
