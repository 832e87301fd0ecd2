"""The name, role, element type and shape of a tensor of the result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moerge.tensors.dtypes import DType


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the result before it has values. `role` is "" where the family is unknown."""

    name: str
    role: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.size * self.dtype.itemsize
