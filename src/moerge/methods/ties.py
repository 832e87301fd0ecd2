"""TIES."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moerge.methods.magnitude import magnitude_thresholds
from moerge.methods.method import Block, Measurement, Scope
from moerge.methods.sparse import SparseMethod, keep_between
from moerge.methods.values import numbers


class Ties(SparseMethod):
    """Trim, elect a sign, merge what agrees (Yadav et al. 2023; MergeME, section 3.1.2 and appendix A).

    Each task vector keeps its `density` largest entries; the sign of their weighted sum is elected for each parameter; the
    entries of that sign are added up (`aggregate: sum`, MergeME) or averaged (`mean`, the original's disjoint mean).
    `scope` is what a threshold spans: `tensor` (mergekit) or `model` (the original, FusionBench, MergeLM).
    Published equivalents: MergeME = the defaults; the original = scope model, aggregate mean, scale 1, density 0.2;
    mergekit = aggregate mean, scale 1 (its `normalize: false` is aggregate sum); FusionBench = scope model.

    Not for experts without a common base, nor for a single expert, which it only prunes.
    """

    name: ClassVar[str] = "ties"
    scope: Scope = "tensor"

    @property
    def elects(self) -> bool:
        """Always."""
        return True

    @property
    def measures(self) -> int:
        """Two passes, none where nothing is trimmed."""
        return 2 if min(numbers(self.density)) < 1 else 0

    @property
    def spans_model(self) -> bool:
        """True with `scope: model`."""
        return self.scope == "model" and self.measures > 0

    def measure(self, experts: int, size: int) -> Measurement:
        """The threshold of each expert."""
        return (yield from magnitude_thresholds(self.kept(experts, size), size))

    def sparsify(self, block: Block) -> None:
        """Trim."""
        if self.measures:
            keep_between(block.theta_EN, block.statistic, np.full_like(block.statistic, np.inf))
