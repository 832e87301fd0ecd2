"""Model breadcrumbs."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import ClassVar

import numpy as np

from moerge.methods.magnitude import magnitudes_at
from moerge.methods.method import Block, Measurement, Unit
from moerge.methods.sparse import ElectiveMethod, RowScope, keep_between, keep_ranks
from moerge.methods.values import Density, Share, each


class Breadcrumbs(ElectiveMethod):
    """theta = theta_base + scale * sum_k w_k m_k tau_k, where m_k drops the largest and the smallest entries of each tensor.

    Davari and Belilovsky 2024, *Model Breadcrumbs*, section 3: the `gamma` n largest entries are outliers, of the others the
    `density` n largest are kept (the paper masks gamma from above and beta from below: density = 1 - beta - gamma). Where both
    do not fit, fewer outliers are dropped, as in mergekit. `scope` is what the ranks span: each `tensor` (the paper, mergekit),
    each `row` (the published code) or the `model`. Entries that equal the largest or smallest kept one are all kept.
    mergekit's breadcrumbs_ties is `elect: sign`; mergekit sets a whole tensor to zero where int(gamma * n) is 0, ours keeps it.

    Not where the largest changes are what was learned, as with facts in few rows of an embedding: those go first.
    """

    name: ClassVar[str] = "breadcrumbs"
    density: Density = 0.9
    gamma: Share = 0.01
    scope: RowScope = "tensor"

    @property
    def unit(self) -> Unit:
        """Rows with `scope: row`."""
        return "rows" if self.scope == "row" else "block"

    @property
    def measures(self) -> int:
        """Two passes, none for rows."""
        return 0 if self.scope == "row" else 2

    @property
    def spans_model(self) -> bool:
        """True with `scope: model`."""
        return self.scope == "model"

    def ranks(self, experts: int, size: int) -> list[tuple[int, int]]:
        """The first and last rank by magnitude that each expert keeps; 1 is the largest of `size`."""
        outliers = [math.floor(Fraction(str(gamma)) * size) for gamma in each(self.gamma, experts)]
        counts = self.kept(experts, size)
        firsts = [1 + min(dropped, size - kept) for dropped, kept in zip(outliers, counts, strict=True)]
        return [(first, first + kept - 1) for first, kept in zip(firsts, counts, strict=True)]

    def measure(self, experts: int, size: int) -> Measurement:
        """The smallest and the largest magnitude that each expert keeps, float32 [2, E]."""
        bounds_2E = np.array([np.zeros(experts), np.full(experts, np.inf)], np.float32)
        ranks = self.ranks(experts, size)
        low = [(0, k, last) for k, (_, last) in enumerate(ranks) if last < size]
        high = [(1, k, first) for k, (first, _) in enumerate(ranks) if first > 1]
        found_T = yield from magnitudes_at([(k, rank) for _, k, rank in (*low, *high)], experts, size)
        for (side, k, _), magnitude in zip((*low, *high), found_T, strict=True):
            bounds_2E[side, k] = magnitude
        return bounds_2E

    def sparsify(self, block: Block) -> None:
        """Drop both ends."""
        if self.scope == "row":
            keep_ranks(block.theta_EN, block.shape[-1], self.ranks(len(block.theta_EN), block.shape[-1]))
        else:
            keep_between(block.theta_EN, *block.statistic)
