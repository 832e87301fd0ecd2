"""Merge methods.

Shapes: E experts, N elements of one block of a tensor. A method sees blocks of float32, never files; what it needs to
know of a whole tensor, or of the whole model, it measures in passes over blocks before it merges them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from moerge.errors import InputError, suggest
from moerge.methods.values import Ordered, PerExpert
from moerge.registry import Registry
from moerge.tensors.kernels import kernel

_ROUNDING = 1e-6
"""Of weights, relative to their size."""
LARGEST = 1e38
"""Of the numbers that recipes give: arithmetic is in float32."""
Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False, strict=True)]
Scope = Literal["tensor", "model"]
Unit = Literal["block", "rows", "tensor"]


@dataclass(frozen=True)
class Block:
    """A method's view of one tensor, from every expert: a run of elements, complete rows or all (see `unit`).

    `theta_EN` holds the experts' values, for task-vector methods their differences to the base; a method may overwrite it.
    `keys_E` are 64-bit random keys, one an expert, that depend on the seed, the expert and the tensor alone; `start` is the
    index of the block's first element in its tensor. Arrays are flat; `shape` is what they hold: (N,) for a run, (rows, columns)
    for rows, the tensor's own for a whole tensor. `extras` are statistics that some operations bring, one for each expert, as
    float32: the same elements as an array KN (zeros where an expert has none), or for whole tensors a list of arrays in their
    own shapes (None where an expert has none).
    """

    theta_EN: np.ndarray
    weights_E: np.ndarray
    base_N: np.ndarray
    out_N: np.ndarray
    statistic: Any
    keys_E: np.ndarray
    start: int
    shape: tuple[int, ...] = ()
    extras: Any = None


@dataclass(frozen=True)
class Statistic:
    """One pass over blocks: `add(theta_EN, total)` adds a block's share to something like `zeros()`.

    That is an array, or an object with `+=` and a `clear()` that makes it zero again.

    Shares are added up in the order of the blocks, so a floating-point total does not depend on threads either. With `runs`
    the pass looks at that many short runs of elements, evenly spaced, instead of at all: a sample. With `uses_base`, `add` is
    also given base_N, which holds nothing where the operation has no base; with `uses_start` then the index of the block's first
    element in its tensor.
    """

    zeros: Callable[[], Any]
    add: Callable[..., None]
    runs: int = 0
    uses_base: bool = False
    uses_start: bool = False


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
    exact_experts: ClassVar[int | None] = None
    or_without_base: ClassVar[str] = ""
    """The end of the error that there is no base, for methods that can do without."""
    scratch: ClassVar[float] = 0
    """`scratch_bytes` as float32 copies of the tensor, for methods that need the same for every shape."""

    @property
    def described(self) -> dict[str, Any]:
        """The settings as plans and cards show them."""
        return dict(self)

    @property
    def unit(self) -> Unit:
        """Return the granularity of a block: any run of elements, complete rows (of the last axis; a vector is one row), or
        the tensor.

        Memory is bounded by blocks, by the longest row, or by the largest tensor: E + 2 float32 copies of it.
        """
        return "block"

    def scratch_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Return the bytes that `merge` allocates beside its block, where that is a whole tensor of this shape, for the
        memory estimate.
        """
        return math.ceil(self.scratch * math.prod(shape) * 4)

    @property
    def measures(self) -> int:
        """Return the number of passes that `measure` makes, for the progress bar; 0 skips it."""
        return 0

    @property
    def spans_model(self) -> bool:
        """Return whether `measure` passes over all tensors of the model together instead of one by one."""
        return False

    @property
    def measured_as(self) -> MergeMethod:
        """The method that `measure` is of: tensors whose methods share it are measured together where it spans the model."""
        return self

    @property
    def random_seed(self) -> int | None:
        """The seed of the random keys in a block, None for methods that draw nothing."""
        return None

    @property
    def divides_by_weights(self) -> bool:
        """Return whether the sum of all weights is a divisor, so that it must not be zero."""
        return False

    def for_experts(self, names: Sequence[str]) -> Self:
        """With each value that is given by name in the order of `names`; InputError if one is missing."""
        changes = {key: value.ordered(f"{self.name}: {key!r}", names) for key, value in self if isinstance(value, PerExpert)}
        return self.model_copy(update=changes) if changes else self

    def for_role(self, role: str) -> Self:
        """Return the method for a tensor of this role, for methods that treat roles apart."""
        return self

    def check_experts(self, names: Sequence[str]) -> None:
        """InputError if a value is given for an expert that there is not, or not for all that there are."""
        for key, value in self:
            unknown = next((name for name in value if name not in names), None) if isinstance(value, PerExpert) else None
            if unknown is not None:
                raise InputError(
                    f"{self.name}: {key!r} names {unknown!r}, which is not an expert: {suggest(unknown, names)}",
                    code="unknown-name",
                )
            if isinstance(value, Ordered) and len(value) != len(names):
                raise InputError(f"{self.name}: {key!r} has {len(value)} values for {len(names)} experts")
        self.for_experts(names)

    def measure(self, experts: int, size: int) -> Measurement:
        """Passes over `size` elements (of the tensor, or of the model where `scope` says so) before merging."""
        yield from ()

    def measure_tensor(self, experts: int, shape: tuple[int, ...]) -> Measurement:
        """Measure one tensor, for methods that look at its rows or columns."""
        return self.measure(experts, math.prod(shape))

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
        """Write tau_merged to `block.out_N`; `block.theta_EN` holds the task vectors."""
        raise NotImplementedError

    def direct(self, block: Block) -> None:
        """Make `block.theta_EN` the trimmed task vectors, one an expert, whose sum `combine` takes.

        Learned coefficients weigh these. Methods that are no such sum leave it as it is, and cannot be learned with.
        """
        raise NotImplementedError

    def merge(self, block: Block) -> None:
        """The subclass's task vector, scaled and added to the base."""
        self.combine(block)
        _add_scaled(block.base_N, np.float32(self.scale), block.out_N)


@kernel
def _add_scaled(base_N: np.ndarray, scale: np.float32, out_N: np.ndarray) -> None:
    for i in range(out_N.size):
        out_N[i] = base_N[i] + scale * out_N[i]


def cancel(weights: Sequence[float]) -> bool:
    """Return whether weights sum to nothing but rounding errors, in float32, so that they cannot be normalized."""
    weights_E = np.array(weights, np.float32).astype(np.float64)
    return bool(abs(weights_E.sum()) <= _ROUNDING * np.abs(weights_E).sum())


METHODS: Registry[type[MergeMethod]] = Registry("moerge.methods", "merge method")


def merge_method(name: str) -> type[MergeMethod]:
    """The method class called `name`; InputError suggests the nearest known one."""
    return METHODS.get(name)


def merge_methods() -> dict[str, type[MergeMethod]]:
    """Return all merge methods by name, built-in and from other packages; `model_fields` of one are its hyperparameters."""
    return {name: METHODS.get(name) for name in METHODS.names()}
