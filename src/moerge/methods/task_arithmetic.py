"""Task arithmetic."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moerge.methods.formulas import weighted_sum
from moerge.methods.method import Block, TaskVectorMethod


class TaskArithmetic(TaskVectorMethod):
    """theta = theta_base + scale * sum_k w_k tau_k (Ilharco et al. 2023).

    With E experts and scale 1/E it is the average. A negative weight unlearns an expert (the paper's negation).
    `normalize` divides by sum_k w_k, as mergekit's option of that name does.
    """

    name: ClassVar[str] = "task_arithmetic"
    normalize: bool = False

    @property
    def divides_by_weights(self) -> bool:
        """True with `normalize`."""
        return self.normalize

    def combine(self, block: Block) -> None:
        """sum_k w_k tau_k."""
        divisor = np.float32(block.weights_E.sum(dtype=np.float64)) if self.normalize else np.float32(1)
        weighted_sum(block.theta_EN, block.weights_E, divisor, block.out_N)

    def direct(self, block: Block) -> None:
        """The task vectors as they are."""
