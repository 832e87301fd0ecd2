"""Tensors that are never stored: base + scale * left @ right, computed where they are read (LoRA, Hu et al. 2022; DoRA).

Shapes: R rows, C columns, K the rank; N elements of a run. Everything is float32, and an element is the same sum in the same
order whatever is read with it, so the result depends on neither windows nor threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from moerge.files import SourceFile
from moerge.tensors.codec import decode
from moerge.tensors.dtypes import F32, DType
from moerge.tensors.kernels import kernel
from moerge.tensors.tensor import Elements, Sized, Tensor, rectangles

_RUN = 1 << 18
"""Elements computed at a time: enough rows that the factors, which all of them need, are not what is read most."""
_STRIP = 512
"""Columns at a time, so that their part of `right` stays in the first-level cache while rows pass."""


@dataclass(frozen=True)
class Factors:
    """The factors of a low-rank tensor, in memory: `magnitude` multiplies rows (R) or columns (C), None where there is none."""

    left_RK: np.ndarray
    right_KC: np.ndarray
    magnitude_R: np.ndarray | None = None
    magnitude_C: np.ndarray | None = None


Loaded = TypeVar("Loaded")
LoadedBy = TypeVar("LoadedBy", covariant=True)


class Loadable(Protocol[LoadedBy]):
    """A named thing whose content is loaded when it is needed."""

    @property
    def name(self) -> str:
        """Return a name that no other one has."""
        ...

    def load(self) -> LoadedBy:
        """Return the content."""
        ...


class Recent(Generic[Loaded]):
    """The content that was used last: all chunks of a tensor need it, whichever thread reads."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._found: OrderedDict[str, Loaded] = OrderedDict()
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def of(self, tensor: Loadable[Loaded]) -> Loaded:
        """The content, loaded by whoever asks first."""
        with self._lock:
            lock = self._locks.setdefault(tensor.name, threading.Lock())
        with lock:
            with self._lock:
                factors = self._found.get(tensor.name)
                if factors is not None:
                    self._found.move_to_end(tensor.name)
                    return factors
            factors = tensor.load()
            with self._lock:
                self._found[tensor.name] = factors
                while len(self._found) > self.capacity:
                    self._found.popitem(last=False)
            return factors


class RecentFactors(Recent[Factors]):
    """The factors used last, shared by the tensors of an adapter."""

    capacity = 4

    def __init__(self) -> None:
        super().__init__(RecentFactors.capacity)


@dataclass(frozen=True)
class LowRankTensor(Sized):
    """`base` plus scale * B @ A; a Tensor of float32, so that what was trained is not rounded to the base's type.

    `a` is [K, in] and `b` [out, K], for a `base` of [out, in], or of [in, out] where `transposed`. Without `a`, `b` is a
    vector that is added to one. With DoRA's `magnitude` [out] (Liu et al. 2024, equation 5) the sum's row for output i, or its
    column where transposed, is given the norm magnitude_i. `settings` is the file with the scale.
    """

    base: Tensor
    a: Tensor | None
    b: Tensor
    scale: float
    transposed: bool
    magnitude: Tensor | None
    settings: SourceFile
    recent: RecentFactors = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The base's name."""
        return self.base.name

    @property
    def dtype(self) -> DType:
        """float32."""
        return F32

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape."""
        return self.base.shape

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The base's, the adapter's, and the adapter's settings."""
        factors = (*(self.a.files if self.a else ()), *self.b.files, *(self.magnitude.files if self.magnitude else ()))
        return tuple(dict.fromkeys((*self.base.files, *factors, self.settings)))

    @property
    def columns(self) -> int:
        """Columns of the matrix; a vector is one row."""
        return self.shape[-1]

    @property
    def working_bytes(self) -> int:
        """Memory that its factors take while it is read."""
        parts = (self.a, self.b, self.magnitude)
        return sum(2 * part.size * F32.itemsize for part in parts if part is not None)

    def open(self) -> LowRankElements:
        """Load the factors, unless they were used a moment ago, and open the base's elements."""
        return LowRankElements(self, self.recent.of(self))

    def load(self) -> Factors:
        """The factors from their files; the norms of a DoRA are computed in one pass over the tensor."""
        b_OK = read_float32(self.b)
        if self.a is None:
            return Factors(np.ones((1, 1), np.float32), b_OK.reshape(1, -1))
        a_KI = read_float32(self.a)
        left_RK, right_KC = (a_KI.T, b_OK.T) if self.transposed else (b_OK, a_KI)
        factors = Factors(np.ascontiguousarray(left_RK), np.ascontiguousarray(right_KC))
        if self.magnitude is None:
            return factors
        magnitude_O = read_float32(self.magnitude).reshape(-1)
        norm_O = np.sqrt(self._squares(factors))
        norm_O[norm_O == 0] = np.nan  # no direction to give a magnitude: whoever reads the row reports it
        ratio_O = (magnitude_O / norm_O).astype(np.float32)
        if self.transposed:
            return Factors(factors.left_RK, factors.right_KC, magnitude_C=ratio_O)
        return Factors(factors.left_RK, factors.right_KC, magnitude_R=ratio_O)

    def _squares(self, factors: Factors) -> np.ndarray:
        """Squared norms of the rows, or of the columns where transposed, in float64."""
        elements, columns = LowRankElements(self, factors), self.columns
        rows = max(1, _RUN // columns)
        parts = []
        for start in range(0, self.size, rows * columns):
            part_N = elements.read(start, np.empty(min(rows * columns, self.size - start), np.float32))
            parts.append(np.square(part_N.reshape(-1, columns), dtype=np.float64).sum(axis=0 if self.transposed else 1))
        return np.sum(parts, axis=0) if self.transposed else np.concatenate(parts)


class LowRankElements:
    """Elements of a low-rank tensor; several threads may read them at a time."""

    def __init__(self, tensor: LowRankTensor, factors: Factors) -> None:
        self._tensor, self._factors = tensor, factors
        self._base: Elements = tensor.base.open()

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Compute elements `start` and following into `out_N`, and return it."""
        dtype = self._tensor.base.dtype
        stored_N = np.empty(min(_RUN, out_N.size), dtype.storage)
        for begin in range(0, out_N.size, _RUN):
            part_N = out_N[begin : begin + _RUN]
            decode(self._base.read(start + begin, stored_N[: part_N.size]), dtype, part_N)
            for row, column, part_RC in rectangles(part_N, start + begin, self._tensor.columns):
                self._complete(row, column, part_RC)
        return out_N

    def _complete(self, row: int, column: int, part_RC: np.ndarray) -> None:
        found = self._factors
        add_product(found.left_RK[row : row + len(part_RC)], found.right_KC, np.float32(self._tensor.scale), column, part_RC)
        if found.magnitude_R is not None:
            part_RC *= found.magnitude_R[row : row + len(part_RC), None]
        if found.magnitude_C is not None:
            part_RC *= found.magnitude_C[column : column + part_RC.shape[1]]


def read_float32(tensor: Tensor) -> np.ndarray:
    """A whole tensor as float32, in its shape."""
    stored_N = tensor.open().read(0, np.empty(tensor.size, tensor.dtype.storage))
    values_N = np.empty(tensor.size, np.float32)
    decode(stored_N, tensor.dtype, values_N)
    return values_N.reshape(tensor.shape)


@kernel
def add_product(left_RK: np.ndarray, right_KC: np.ndarray, scale: np.float32, column: int, out_RC: np.ndarray) -> None:
    """out += scale * left @ right[:, column:], with each element's sum over K in order."""
    rank, rows, columns = left_RK.shape[1], out_RC.shape[0], out_RC.shape[1]
    fours = rank - rank % 4
    buffer_S = np.empty(_STRIP, np.float32)
    for start in range(0, columns, _STRIP):
        stop = min(start + _STRIP, columns)
        first, last = column + start, column + stop
        sum_S = buffer_S[: stop - start]
        for row in range(rows):
            sum_S[:] = np.float32(0)
            for k in range(0, fours, 4):  # four at a time: fewer passes over the sums, which add up in the same order
                l0, l1, l2, l3 = left_RK[row, k], left_RK[row, k + 1], left_RK[row, k + 2], left_RK[row, k + 3]
                r0_S, r1_S = right_KC[k, first:last], right_KC[k + 1, first:last]
                r2_S, r3_S = right_KC[k + 2, first:last], right_KC[k + 3, first:last]
                for c in range(sum_S.size):
                    sum_S[c] = sum_S[c] + l0 * r0_S[c] + l1 * r1_S[c] + l2 * r2_S[c] + l3 * r3_S[c]
            for k in range(fours, rank):
                factor, right_S = left_RK[row, k], right_KC[k, first:last]
                for c in range(sum_S.size):
                    sum_S[c] += factor * right_S[c]
            out_S = out_RC[row, start:stop]
            for c in range(sum_S.size):
                out_S[c] += scale * sum_S[c]
