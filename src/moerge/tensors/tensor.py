"""Protocols of tensors: something in a file, in memory, or computed from others as it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moerge.files import SourceFile
from moerge.tensors.dtypes import DType


class Tensor(Protocol):
    """A tensor's facts and access to its elements. Readers never ask for more than a window of elements at a time."""

    @property
    def name(self) -> str:
        """Return the tensor's name in its model."""
        ...

    @property
    def dtype(self) -> DType:
        """Its element type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def size(self) -> int:
        """Number of elements."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take when they are read."""
        ...

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files it is read from: a plan made before one of them changed is out of date."""
        ...

    def open(self) -> Elements:
        """Access to its elements."""
        ...


class Elements(Protocol):
    """Access to an opened tensor."""

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Elements `start` and following in storage type, as many as `out_N` has; in `out_N`, or a view of what is in memory."""
        ...


class Sized:
    """Properties that follow from a tensor's shape and element type."""

    @property
    def size(self: Tensor) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self: Tensor) -> int:
        """Bytes that its elements take when they are read."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class ArrayTensor(Sized):
    """A Tensor whose elements are in memory, in storage type and without their shape."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    flat: np.ndarray = field(repr=False)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """None."""
        return ()

    def open(self) -> ArrayTensor:
        """Access to its elements."""
        return self

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Elements `start` and following, as many as `out_N` has."""
        return self.flat[start : start + out_N.size]


def windows(tensor: Tensor, size: int) -> Iterator[np.ndarray]:
    """Read a tensor's elements in order, in storage type, at most `size` at a time."""
    elements = tensor.open()
    for start in range(0, tensor.size, size):
        yield elements.read(start, np.empty(min(size, tensor.size - start), tensor.dtype.storage))


def rectangles(out_N: np.ndarray, start: int, columns: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Elements `start` and following of a matrix as the end of a row, whole rows, and the beginning of one: row, column, view."""
    done = 0
    while done < out_N.size:
        row, column = divmod(start + done, columns)
        rest_N = out_N[done:]
        width = min(columns - column, rest_N.size)
        height = rest_N.size // columns if width == columns else 1
        yield row, column, rest_N[: height * width].reshape(height, width)
        done += height * width
