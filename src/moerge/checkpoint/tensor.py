"""What can be read like a tensor: something in a file, in memory, or computed from others as it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from moerge.checkpoint.dtypes import DType


class Tensor(Protocol):
    """A tensor's facts and access to its elements. Readers never ask for more than a window of elements at a time."""

    @property
    def name(self) -> str:
        """What the tensor is called in its model."""
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
    def files(self) -> tuple[Path, ...]:
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


@dataclass(frozen=True)
class ArrayTensor:
    """A Tensor whose elements are in memory, in storage type and without their shape."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    flat: np.ndarray = field(repr=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.flat.size

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.flat.nbytes

    @property
    def files(self) -> tuple[Path, ...]:
        """None."""
        return ()

    def open(self) -> ArrayTensor:
        """Access to its elements."""
        return self

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Elements `start` and following, as many as `out_N` has."""
        return self.flat[start : start + out_N.size]
