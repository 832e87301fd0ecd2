"""NearSwap."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from moerge.methods.method import LARGEST, Block, MergeMethod


class NearSwap(MergeMethod):
    """theta = theta_base + clip(tau, -t, t): the expert where it lies within `t` of the base, at most `t` towards it elsewhere.

    Of exactly one expert (alchemonaut's QuartetAnemoi-70B; mergekit, which writes min(1, t / |tau|) * theta +
    (1 - min(1, t / |tau|)) * theta_base, the same but for differences and t below 1e-6).

    Not for a `t` above the usual difference, which gives the expert, and not for keeping an expert's skills: what changed most
    in its training is what is cut off.
    """

    name: ClassVar[str] = "nearswap"
    uses_task_vectors: ClassVar[bool] = True
    uses_weights: ClassVar[bool] = False
    exact_experts: ClassVar[int | None] = 1
    t: Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)] = 1e-4

    def merge(self, block: Block) -> None:
        """The clipped task vector, from the base on."""
        limit = np.float32(self.t)
        np.clip(block.theta_EN[0], -limit, limit, out=block.out_N)
        np.add(block.base_N, block.out_N, out=block.out_N)
