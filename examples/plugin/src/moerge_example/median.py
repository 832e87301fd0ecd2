"""The median of task vectors."""

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from moerge.plugins import Block, TaskVectorMethod


class Median(TaskVectorMethod):
    """theta = theta_base + scale * median_k tau_k, entry by entry.

    One expert that went astray does not move it, whatever the others' values. Not for two experts, whose median is their mean.
    """

    name: ClassVar[str] = "median"
    uses_weights: ClassVar[bool] = False
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    def combine(self, block: Block) -> None:
        """`theta_EN` holds the experts' task vectors; what is left in `out_N` is multiplied by `scale` and added to the base."""
        block.out_N[:] = np.median(block.theta_EN, axis=0)
