"""DELLA."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from moerge.methods.method import Block, Finite, Unit
from moerge.methods.ranking import magnitude_order
from moerge.methods.sparse import ElectiveMethod
from moerge.methods.values import Density, Share, Values, each, pairs
from moerge.tensors.kernels import kernel
from moerge.tensors.random import drop_each


class Della(ElectiveMethod):
    """Drop at random, large entries less often; rescale each by its own probability; elect and merge (Deep et al. 2024).

    MagPrune (section 3.1): in each row, the entry of rank r by magnitude (1 is the smallest of n) is kept with probability
    p_r = density - epsilon + 2 epsilon (r - 1) / (n - 1), and divided by p_r so that its expectation is unchanged. Then TIES'
    election and the mean of what agrees (sections 3.2 and 3.3): the defaults. A vector is one row; equal entries are ranked by
    position. `epsilon` is that of the published code and of mergekit, half of the paper's, which is the width of the window.
    mergekit's della is `aggregate: sum`, its della_linear `elect: none` with it, but mergekit restores each tensor's L1 norm
    instead of dividing by p_r.

    Not where one run must be reliable: like DARE, it varies with the seed.
    """

    name: ClassVar[str] = "della"
    scale: Finite = 1.0
    density: Density = 0.5
    epsilon: Share = 0.1
    rescale: bool = True
    elect: Literal["none", "sign"] = "sign"
    aggregate: Literal["sum", "mean"] = "mean"
    seed: int = 0

    @field_validator("epsilon")
    @classmethod
    def _within_bounds(cls, epsilon: Values, info: ValidationInfo) -> Values:
        for one, density in pairs(epsilon, info.data.get("density", 1.0)):
            limit = min(density, 1 - density)
            if density < 1 and one >= limit:
                message = "should be below {limit}, so that probabilities stay within 0 and 1"
                raise PydanticCustomError("window", message, {"limit": f"{limit:g}"})
        return epsilon

    @property
    def unit(self) -> Unit:
        """Rows."""
        return "rows"

    @property
    def random_seed(self) -> int:
        """The seed of the masks."""
        return self.seed

    def sparsify(self, block: Block) -> None:
        """MagPrune."""
        experts, size = block.theta_EN.shape
        kept_N = np.empty(size, np.float64)
        settings = zip(each(self.density, experts), each(self.epsilon, experts), strict=True)
        for tau_N, key, (density, epsilon) in zip(block.theta_EN, block.keys_E, settings, strict=True):
            if density < 1:
                _probabilities(tau_N, block.shape[-1], density, epsilon, kept_N)
                drop_each(tau_N, key, block.start, kept_N, self.rescale)


@kernel
def _probabilities(tau_N: np.ndarray, columns: int, density: float, epsilon: float, kept_N: np.ndarray) -> None:
    order_C, spare_C = np.empty(columns, np.uint32), np.empty(columns, np.uint32)
    for start in range(0, tau_N.size, columns):
        magnitude_order(tau_N[start : start + columns], order_C, spare_C)
        kept_N[start] = density
        for rank in range(columns if columns > 1 else 0):
            kept_N[start + order_C[rank]] = density - epsilon + 2 * epsilon * rank / (columns - 1)
