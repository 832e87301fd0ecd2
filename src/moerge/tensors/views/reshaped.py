"""Elements in another shape: of a convolution's weight as a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moerge.files import SourceFile
from moerge.tensors.dtypes import DType
from moerge.tensors.tensor import Elements, Sized, Tensor


@dataclass(frozen=True)
class Reshaped(Sized):
    """A Tensor with the elements of another one, in the same order."""

    of: Tensor
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The other one's name."""
        return self.of.name

    @property
    def dtype(self) -> DType:
        """The other one's element type."""
        return self.of.dtype

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The other one's files."""
        return self.of.files

    def open(self) -> Elements:
        """Access to its elements."""
        return self.of.open()


def as_matrix(tensor: Tensor) -> Tensor:
    """A tensor of more than two axes as a matrix with the first axis for rows."""
    rows, *others = tensor.shape
    return Reshaped(tensor, (rows, math.prod(others))) if len(others) > 1 else tensor
