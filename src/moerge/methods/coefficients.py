"""Coefficients that were learned before, instead of a scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import Field, InstanceOf

from moerge.errors import InputError
from moerge.methods.formulas import weigh_chunks
from moerge.methods.method import Block, Finite, Measurement, MergeMethod, TaskVectorMethod, Unit


class Coefficients(TaskVectorMethod):
    """theta = theta_base + scale * sum_k c_k tau_k with learned c_k (Expert Merging and ++, arXiv 2509.25712).

    `file` is what `moerge learn` wrote, relative to the recipe: coefficients for each tensor, expert and, with ++, contiguous
    chunk of the flattened tensor, and which method's task vectors (trimmed or not) the tau_k are. Tensors that did not learn
    have the file's fixed coefficient.

    Not for other experts or another base than those that it was learned with.
    """

    name: ClassVar[str] = "coefficients"
    uses_weights: ClassVar[bool] = False
    file: str
    scale: Finite = 1.0


class Weighed(TaskVectorMethod):
    """The learned coefficients of one tensor: `c_EC` holds a row an expert, and chunk i is the elements from i * `chunk`."""

    name: ClassVar[str] = "coefficients"
    scale: Finite = 1.0
    directions: InstanceOf[TaskVectorMethod]
    c_EC: tuple[tuple[float, ...], ...]
    chunk: Annotated[int, Field(ge=1)]

    @property
    def described(self) -> dict[str, Any]:
        """Return the scale of all tensors."""
        return {"scale": self.scale, "directions": self.directions.name, "coefficients": "learned"}

    @property
    def unit(self) -> Unit:
        """Follow the directions."""
        return self.directions.unit

    def scratch_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Follow the directions."""
        return self.directions.scratch_bytes(shape, experts)

    @property
    def measured_as(self) -> MergeMethod:
        """The directions: coefficients differ from tensor to tensor, but a threshold of the model is the same for all."""
        return self.directions.measured_as

    @property
    def measures(self) -> int:
        """Return the passes that the directions need."""
        return self.directions.measures

    @property
    def spans_model(self) -> bool:
        """Follow the directions."""
        return self.directions.spans_model

    @property
    def random_seed(self) -> int | None:
        """Follow the directions."""
        return self.directions.random_seed

    def for_experts(self, names: Sequence[str]) -> Self:
        """With the directions' values in the order of `names`."""
        return self.model_copy(update={"directions": self.directions.for_experts(names)})

    def measure(self, experts: int, size: int) -> Measurement:
        """Follow the directions."""
        return (yield from self.directions.measure(experts, size))

    def combine(self, block: Block) -> None:
        """sum_k c_k tau_k. Raises InputError where there is no coefficient for an expert or an element: kernels do not look."""
        c_EC, experts, end = np.array(self.c_EC, np.float32), len(block.theta_EN), block.start + block.out_N.size
        if len(c_EC) != experts or -(-end // self.chunk) > c_EC.shape[1]:
            have = f"{len(c_EC)} rows of coefficients for {c_EC.shape[1]} chunks of {self.chunk} entries"
            raise InputError(f"{have} do not fit a tensor of {experts} experts and at least {end} entries: learn again")
        self.directions.direct(block)
        weigh_chunks(block.theta_EN, c_EC, self.chunk, block.start, block.out_N)
