"""A tensor's values as another element type holds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moerge.files import SourceFile
from moerge.tensors.codec import decode, encode
from moerge.tensors.dtypes import DType
from moerge.tensors.tensor import Sized, Tensor


def rounded(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Values of any shape as they are once they have been written as `dtype`, float32."""
    flat_N = np.array(values, np.float32).reshape(-1)
    stored_N = np.empty(flat_N.size, dtype.storage)
    encode(flat_N, dtype, stored_N)
    decode(stored_N, dtype, flat_N)
    return flat_N.reshape(np.shape(values))


@dataclass(frozen=True)
class Rounded(Sized):
    """The elements of `source`, a tensor of floats, rounded to `dtype` as a merge rounds them."""

    source: Tensor
    dtype: DType

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's."""
        return self.source.shape

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The source's."""
        return self.source.files

    def open(self) -> RoundedElements:
        """Access to the elements."""
        return RoundedElements(self)


class RoundedElements:
    """Access to the elements of a rounded tensor."""

    def __init__(self, tensor: Rounded) -> None:
        self._dtype, self._source, self._elements = tensor.dtype, tensor.source.dtype, tensor.source.open()

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Fill `out_N` with elements `start` and following, and return it."""
        values_N = np.empty(out_N.size, np.float32)
        decode(self._elements.read(start, np.empty(out_N.size, self._source.storage)), self._source, values_N)
        encode(values_N, self._dtype, out_N)
        return out_N
