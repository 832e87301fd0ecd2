"""What a merge method is.

Shapes: K experts, N elements of one block of a tensor. A method sees blocks of float32, never files; what it needs to
know of a whole tensor, or of the whole model, it measures in passes over blocks before it merges them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from moerge.methods.jit import kernel
from moerge.registry import Registry

Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=True)]
"""A fraction kept, in (0, 1]."""
Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Scope = Literal["tensor", "model"]


@dataclass(frozen=True)
class Block:
    """A run of elements of one tensor, from every expert.

    `theta_KN` holds the experts' values, for task-vector methods their differences to the base; a method may overwrite it.
    `keys_K` are 64-bit random keys, one an expert, that depend on the seed, the expert and the tensor alone; `start` is the
    index of the block's first element in its tensor.
    """

    theta_KN: np.ndarray
    weights_K: np.ndarray
    base_N: np.ndarray
    out_N: np.ndarray
    statistic: Any
    keys_K: np.ndarray
    start: int


@dataclass(frozen=True)
class Statistic:
    """One pass over blocks: `add(theta_KN, total)` adds a block's share to something like `zeros()`.

    That is an array, or an object with `+=` and a `clear()` that makes it zero again.

    Shares are added up in the order of the blocks, so a floating-point total does not depend on threads either. With `runs`
    the pass looks at that many short runs of elements, evenly spaced, instead of at all: a sample.
    """

    zeros: Callable[[], Any]
    add: Callable[[np.ndarray, Any], None]
    runs: int = 0


Measurement = Generator[Statistic, Any, Any]
"""Yields one pass after another, is sent its total, returns the statistic that `merge` will find in its block."""


class MergeMethod(BaseModel):
    """A merge method: its hyperparameters as fields, its formula in `merge`.

    Register a subclass under the entry point group `moerge.methods` and recipes can name it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: ClassVar[str]
    uses_task_vectors: ClassVar[bool] = False
    uses_weights: ClassVar[bool] = True
    measures: ClassVar[int] = 0
    """How many passes `measure` makes, for the progress bar; 0 skips it."""
    exact_experts: ClassVar[int | None] = None

    @property
    def spans_model(self) -> bool:
        """Whether `measure` passes over all tensors of the model together instead of one by one."""
        return False

    @property
    def random_seed(self) -> int | None:
        """The seed of the random keys in a block, None for methods that draw nothing."""
        return None

    @property
    def divides_by_weights(self) -> bool:
        """Whether the sum of all weights is a divisor, so that it must not be zero."""
        return False

    def measure(self, experts: int, size: int) -> Measurement:
        """Passes over `size` elements (of the tensor, or of the model where `scope` says so) before merging."""
        yield from ()

    def merge(self, block: Block) -> None:
        """Write the merged values to `block.out_N`."""
        raise NotImplementedError


class TaskVectorMethod(MergeMethod):
    """theta_merged = theta_base + scale * tau_merged, where a subclass says what tau_merged is (MergeME, section 3.1.2).

    tau_i = theta_i - theta_base. MergeME prints the opposite sign, which would move away from the experts.
    """

    uses_task_vectors: ClassVar[bool] = True
    scale: Finite = 1 / 3

    def combine(self, block: Block) -> None:
        """Write tau_merged to `block.out_N`; `block.theta_KN` holds the task vectors."""
        raise NotImplementedError

    def merge(self, block: Block) -> None:
        """The subclass's task vector, scaled and added to the base."""
        self.combine(block)
        _add_scaled(block.base_N, np.float32(self.scale), block.out_N)


@kernel
def _add_scaled(base_N: np.ndarray, scale: np.float32, out_N: np.ndarray) -> None:
    for i in range(out_N.size):
        out_N[i] = base_N[i] + scale * out_N[i]


_METHODS: Registry[type[MergeMethod]] = Registry("moerge.methods", "merge method")


def merge_method(name: str) -> type[MergeMethod]:
    """The method class called `name`; InputError suggests the nearest known one."""
    return _METHODS.get(name)


def merge_methods() -> list[str]:
    """Names of all merge methods, built-in and from other packages."""
    return _METHODS.names()
