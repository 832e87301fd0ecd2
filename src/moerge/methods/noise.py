"""Noise on the tensors of one model."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from moerge.methods.method import LARGEST, Block, MergeMethod
from moerge.tensors.random import normal


class Noise(MergeMethod):
    """theta = theta_expert + scale * z, z standard normal and independent for each entry (mergekit-moe's `noise_scale`).

    Of exactly one expert. For copies of one model that are to become different experts of a mixture: without it they get the
    same gradients as long as the router sends them the same tokens.

    Not for a model that is used as it is: noise of the size of a fine-tuning's changes undoes them.
    """

    name: ClassVar[str] = "noise"
    uses_weights: ClassVar[bool] = False
    exact_experts: ClassVar[int | None] = 1
    scale: Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)] = 1e-3
    seed: int = 0

    @property
    def random_seed(self) -> int:
        """The seed of the noise."""
        return self.seed

    def merge(self, block: Block) -> None:
        """The expert and its noise."""
        normal(block.keys_E[0], block.start, block.out_N)
        np.multiply(block.out_N, np.float32(self.scale), out=block.out_N)
        np.add(block.out_N, block.theta_EN[0], out=block.out_N)
