"""Sums as methods see them: divided by how much text they are of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moerge.errors import InputError
from moerge.files import SourceFile
from moerge.tensors.dtypes import DType
from moerge.tensors.tensor import Elements, Sized, Tensor


@dataclass(frozen=True)
class Scaled(Sized):
    """A Tensor: another one, of float32, times `scale`, and at least `least`; one that has a least value may not be negative."""

    inner: Tensor
    name: str
    scale: float
    least: float | None = None

    @property
    def dtype(self) -> DType:
        """float32."""
        return self.inner.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the other tensor."""
        return self.inner.shape

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Return the files of the other tensor."""
        return self.inner.files

    @property
    def _where(self) -> str:
        place = f"{self.files[0].path}: " if self.files else ""
        return f"{place}the statistic of tensor {self.name!r}"

    def open(self) -> _ScaledElements:
        """Access to the products."""
        return _ScaledElements(self.inner.open(), np.float32(self.scale), self.least, self._where)


@dataclass(frozen=True)
class _ScaledElements:
    inner: Elements
    scale: np.float32
    least: float | None
    where: str

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        np.multiply(self.inner.read(start, out_N), self.scale, out=out_N)
        if self.least is not None:
            if (out_N < 0).any():
                raise InputError(f"{self.where} is negative somewhere, which no sum of squares is: gather it again")
            np.maximum(out_N, np.float32(self.least), out=out_N)
        return out_N
