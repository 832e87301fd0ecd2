"""Fisher merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from moerge.methods.method import Block
from moerge.methods.statistical import StatisticsMethod
from moerge.tensors.kernels import STRIP, kernel
from moerge.tensors.views.scaled import Scaled

if TYPE_CHECKING:
    from moerge.statistics.files import Statistics
    from moerge.tensors.tensor import Tensor


class Fisher(StatisticsMethod):
    """theta = sum_k w_k F_k theta_k / sum_k w_k F_k, entry by entry, F_k the diagonal Fisher information of expert k.

    Matena and Raffel 2022, arXiv 2111.09832, equation 4: F is the mean square of the gradient of log p over sequences
    (`per: sequence`) or, for experts whose texts differ in length, over tokens. An entry counts with at least `floor` times the
    mean of its expert's F over the model, so that what no expert needs is averaged; published code has absolute floors instead
    (1e-6, in bloomberg's 1e-10), which at the size of a language model's F make it a plain average. `normalize` divides F by
    its norm over the `model` (the paper, section 3.3) or over each `tensor` (an option of bloomberg's dataless-model-merging).

    Not for experts without text of their own, nor where `average` is already below every expert's loss: F is a local estimate.
    """

    name: ClassVar[str] = "fisher"
    kind: ClassVar[Literal["fisher", "gram"]] = "fisher"
    floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    normalize: Literal["none", "tensor", "model"] = "none"
    per: Literal["sequence", "token"] = "sequence"

    def prepared(self, statistics: Statistics, tensor: str) -> Tensor | None:
        """The mean of the squared gradient, normalized, and not below the floor."""
        stored = statistics.fisher(tensor)
        if stored is None:
            return None
        facts = statistics.facts
        norm = 0.0
        if self.normalize != "none":
            own = facts.fisher[tensor][1] ** 0.5
            norm = own if self.normalize == "tensor" and own > 0 else statistics.fisher_norm
        scale = 1 / (norm or (facts.sequences if self.per == "sequence" else facts.predicted))
        return Scaled(stored, tensor, scale, self.floor * statistics.fisher_mean * scale)

    def merge(self, block: Block) -> None:
        """The mean weighted by Fisher information; that by the experts' weights where nobody has any."""
        _weighted_mean(block.theta_EN, block.extras, block.weights_E, block.out_N)


@kernel
def _weighted_mean(theta_EN: np.ndarray, fisher_EN: np.ndarray, weights_E: np.ndarray, out_N: np.ndarray) -> None:
    # in float64: products of a Fisher information of 1e-20 and a weight must neither vanish nor lose digits
    sums, masses = np.empty(STRIP, np.float64), np.empty(STRIP, np.float64)
    for start in range(0, out_N.size, STRIP):
        out_S = out_N[start : start + STRIP]
        sums[:] = 0.0
        masses[:] = 0.0
        for k in range(len(weights_E)):
            theta_S, fisher_S = theta_EN[k, start : start + STRIP], fisher_EN[k, start : start + STRIP]
            weight = np.float64(weights_E[k])
            for i in range(out_S.size):
                mass = weight * np.float64(fisher_S[i])
                sums[i] += mass * np.float64(theta_S[i])
                masses[i] += mass
        for i in range(out_S.size):
            if masses[i] == 0.0:
                for k in range(len(weights_E)):
                    sums[i] += np.float64(weights_E[k]) * np.float64(theta_EN[k, start + i])
                    masses[i] += np.float64(weights_E[k])
            out_S[i] = np.float32(sums[i] / masses[i])
