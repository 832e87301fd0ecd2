"""Spherical interpolation."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from moerge.methods.formulas import weighted_sum
from moerge.methods.method import Block, Measurement, MergeMethod, Statistic
from moerge.tensors.kernels import kernel

_LANES = 16


class Slerp(MergeMethod):
    """theta = sin((1 - t) phi) / sin(phi) * theta_1 + sin(t phi) / sin(phi) * theta_2, phi the angle between the tensors.

    Of exactly two experts, their weights themselves (not task vectors), each tensor as one vector (Shoemake 1985; mergekit,
    FusionBench). Where |cos(phi)| reaches `dot_threshold`, or a tensor is zero, it interpolates linearly.

    Not for more than two experts, and hardly different from `linear` for experts of one ancestor, whose angle is small.
    """

    name: ClassVar[str] = "slerp"
    uses_weights: ClassVar[bool] = False
    exact_experts: ClassVar[int | None] = 2
    t: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    dot_threshold: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.9995

    @property
    def measures(self) -> int:
        """One pass."""
        return 1

    def measure(self, experts: int, size: int) -> Measurement:
        """The two coefficients, float32 [2], from the tensors' norms and dot product in float64."""
        products = yield Statistic(partial(np.zeros, (3, _LANES)), _add_products)
        first, second, dot = (math.fsum(lanes) for lanes in products)
        norms = math.sqrt(first) * math.sqrt(second)
        cosine = dot / norms if norms > 0 else 1.0
        if abs(cosine) >= self.dot_threshold:
            return np.array([1 - self.t, self.t], np.float32)
        angle = math.acos(cosine)
        return np.array([math.sin(share * angle) / math.sin(angle) for share in (1 - self.t, self.t)], np.float32)

    def merge(self, block: Block) -> None:
        """The interpolation with the measured coefficients."""
        weighted_sum(block.theta_EN, block.statistic, np.float32(1), block.out_N)


@kernel
def _add_products(theta_EN: np.ndarray, total: np.ndarray) -> None:
    # sixteen running sums, so that the order of additions is fixed and still vectorises
    first_N, second_N = theta_EN[0], theta_EN[1]
    whole = first_N.size - first_N.size % _LANES
    for start in range(0, whole, _LANES):
        for lane in range(_LANES):
            a, b = np.float64(first_N[start + lane]), np.float64(second_N[start + lane])
            total[0, lane] += a * a
            total[1, lane] += b * b
            total[2, lane] += a * b
    for i in range(whole, first_N.size):
        a, b = np.float64(first_N[i]), np.float64(second_N[i])
        total[0, 0] += a * a
        total[1, 0] += b * b
        total[2, 0] += a * b
