"""TIES."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from moerge.methods.formulas import elected_sum
from moerge.methods.jit import kernel
from moerge.methods.magnitude import magnitude_thresholds
from moerge.methods.method import Block, Density, Measurement, Scope, TaskVectorMethod


class Ties(TaskVectorMethod):
    """Trim, elect a sign, merge what agrees (Yadav et al. 2023; MergeME, section 3.1.2 and appendix A).

    Each task vector keeps its `density` largest entries; the sign of their weighted sum is elected for each parameter; the
    entries of that sign are added up (`aggregate: sum`, MergeME) or averaged (`mean`, the original's disjoint mean).
    `scope` is what a threshold spans: `tensor` (mergekit) or `model` (the original, FusionBench, MergeLM).
    Published equivalents: MergeME = the defaults; the original = scope model, aggregate mean, scale 1, density 0.2;
    mergekit = aggregate mean, scale 1 (its `normalize: false` is aggregate sum); FusionBench = scope model.

    Not for experts without a common base, nor for a single expert, which it only prunes.
    """

    name: ClassVar[str] = "ties"
    measures: ClassVar[int] = 2
    density: Density = 0.8
    scope: Scope = "tensor"
    aggregate: Literal["sum", "mean"] = "sum"

    @property
    def spans_model(self) -> bool:
        """True with `scope: model`."""
        return self.scope == "model"

    def measure(self, experts: int, size: int) -> Measurement:
        """The threshold of each expert."""
        return (yield from magnitude_thresholds(self.density, experts, size))

    def combine(self, block: Block) -> None:
        """Trim, then sum what agrees with the elected sign."""
        _trim(block.theta_KN, block.statistic)
        elected_sum(block.theta_KN, block.weights_K, self.aggregate == "mean", block.out_N)


@kernel
def _trim(tau_KN: np.ndarray, thresholds_K: np.ndarray) -> None:
    for k in range(len(thresholds_K)):
        threshold = thresholds_K[k]
        for i in range(tau_KN.shape[1]):
            tau = tau_KN[k, i]
            tau_KN[k, i] = np.float32(0) if abs(tau) < threshold else tau
