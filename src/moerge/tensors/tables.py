"""Tables with a row for each token, read some rows at a time. Shapes: R rows of a block, D columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moerge.errors import InputError
from moerge.tensors.codec import decode
from moerge.tensors.streams import WINDOW
from moerge.tensors.tensor import Tensor


class Table:
    """A matrix, or a vector as one row, whose rows can be read in any order. `owner` is the model that messages name."""

    def __init__(self, tensor: Tensor, owner: str) -> None:
        self.tensor, self.owner = tensor, owner
        self.rows, self.columns = tensor.shape if len(tensor.shape) == 2 else (1, tensor.size)
        self._elements = tensor.open()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop, float32 [R, D]; InputError if they hold NaN or infinity."""
        first, last = start * self.columns, stop * self.columns
        out_N = np.empty(last - first, np.float32)
        for begin in range(first, last, WINDOW):
            end = min(begin + WINDOW, last)
            stored_N = self._elements.read(begin, np.empty(end - begin, self.tensor.dtype.storage))
            if not decode(stored_N, self.tensor.dtype, out_N[begin - first : end - first]):
                raise InputError(
                    f"{self.owner}: tensor {self.tensor.name!r} holds NaN or infinity, so nothing can be fitted to it: "
                    "repair or drop this expert"
                )
        return out_N.reshape(-1, self.columns)

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some rows in this order, float32 [R, D]; those that follow one another are read in one go."""
        rows_R = np.asarray(rows, np.int64)
        if not rows_R.size:
            return np.empty((0, self.columns), np.float32)
        runs = np.split(rows_R, np.flatnonzero(np.diff(rows_R) != 1) + 1)
        return np.concatenate([self.read(int(run[0]), int(run[-1]) + 1) for run in runs])


def blocks(rows: int, count: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `count` rows that make up all of them."""
    for start in range(0, rows, count):
        yield start, min(start + count, rows)
