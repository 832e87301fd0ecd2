"""A run of another tensor's elements under a name and shape of its own: one expert's part of a tensor that holds all."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moerge.files import SourceFile
from moerge.tensors.dtypes import DType
from moerge.tensors.tensor import Elements, Sized, Tensor


@dataclass(frozen=True)
class SpanTensor(Sized):
    """Elements `start` and following of `inner`, as many as `shape` holds; bytes are those of `inner`."""

    name: str
    shape: tuple[int, ...]
    inner: Tensor = field(repr=False)
    start: int = 0

    def __post_init__(self) -> None:
        assert self.start + self.size <= self.inner.size, self.name

    @property
    def dtype(self) -> DType:
        """Return the other tensor's element type."""
        return self.inner.dtype

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Return the other tensor's files."""
        return self.inner.files

    def open(self) -> SpanElements:
        """Access to the elements."""
        return SpanElements(self.inner.open(), self.start)


@dataclass(frozen=True)
class SpanElements:
    """Access to an opened span."""

    inner: Elements
    begin: int

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Elements `start` and following, as many as `out_N` has."""
        return self.inner.read(self.begin + start, out_N)


def same_elements(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are the same elements of the same file, under whatever names."""
    (a, start), (b, begin) = _origin(first), _origin(second)
    return a == b and start == begin and first.shape == second.shape


def _origin(tensor: Tensor) -> tuple[Tensor, int]:
    if not isinstance(tensor, SpanTensor):
        return tensor, 0
    inner, start = _origin(tensor.inner)
    return inner, start + tensor.start
