"""A model's embedding or head on another tokenizer's tokens: each row made of the rows of the pieces of its text.

Shapes: V rows of this tensor, P pieces, D columns of the source; N elements of a run, R rows and C columns of a rectangle.
An element is the same sum in the same order whatever is read with it, so the result depends on neither windows nor threads.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from moerge.files import SourceFile
from moerge.tensors.codec import decode
from moerge.tensors.dtypes import F32, DType
from moerge.tensors.kernels import kernel
from moerge.tensors.tensor import Elements, Sized, Tensor, rectangles
from moerge.tokenizer.pieces import EXACT, TokenAlignment

_RUN = 1 << 18
"""Elements of the source that are held at a time, unless one row is made of more."""


@dataclass(frozen=True, eq=False)
class ComposedRows(Sized):
    """A Tensor [V, width] whose row v is the mean of the rows `pieces` gives for v of `source`, [own rows, D], times `scale`.

    Rows without pieces are the mean of all the table's rows. Columns from D up to `width` are zeros; a vector, such as the bias
    of a head, is [V] and has no width. Sums are in float64 and rounded once. The element type is the source's where rows are
    copied and nothing is computed, float32 elsewhere; rows of one piece are exact either way.
    """

    name: str
    source: Tensor
    pieces: TokenAlignment = field(repr=False)
    width: int | None = None
    scale: float = 1.0
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        columns = self.source.shape[1:]
        assert len(columns) <= 1, f"{self.source.name} is neither a matrix nor a vector"
        assert self.width is None or (columns and self.width >= columns[0]), f"{self.source.name} is no matrix, or wider"
        assert not len(self.pieces.rows_P) or self.pieces.rows_P.max() < self.source.shape[0], "a piece without a row"

    @cached_property
    def dtype(self) -> DType:
        """The source's element type, or float32."""
        return self.source.dtype if self.copies else F32

    @cached_property
    def copies(self) -> bool:
        """Return whether each row is a copy of one of the source's, and nothing is computed."""
        return self.scale == 1 and bool((self.pieces.kinds_V == EXACT).all())

    @property
    def shape(self) -> tuple[int, ...]:
        """V rows, of `width` columns."""
        return (len(self.pieces.kinds_V), *((self.width or size) for size in self.source.shape[1:]))

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The source's."""
        return self.source.files

    def open(self) -> ComposedElements:
        """Access to the elements."""
        return ComposedElements(self)

    def mean_row(self) -> np.ndarray:
        """The mean of the source's rows as float64, [D], times `scale`: computed in one pass by whoever asks first."""
        with self._lock:
            return self._mean_row

    @cached_property
    def _mean_row(self) -> np.ndarray:
        count, columns = self.source.shape[0], math.prod(self.source.shape[1:])
        elements, rows = self.source.open(), max(1, _RUN // max(1, columns))
        sum_D = np.zeros(columns)
        for first in range(0, count, rows):
            values_N = _read(elements, self.source.dtype, first * columns, (min(first + rows, count) - first) * columns)
            _add_rows(values_N.reshape(-1, columns), sum_D)
        return sum_D / max(1, count) * self.scale


class ComposedElements:
    """Elements of composed rows; several threads may read them at a time."""

    def __init__(self, tensor: ComposedRows) -> None:
        self._tensor, self._source = tensor, tensor.source.open()
        self._columns, self._width = math.prod(tensor.source.shape[1:]), math.prod(tensor.shape[1:])

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Fill `out_N` with elements `start` and following, and return it."""
        for row, column, part_RC in rectangles(out_N, start, self._width):
            within = max(0, min(self._columns - column, part_RC.shape[1]))
            part_RC[:, within:] = 0
            if within:
                self._fill(row, column, part_RC[:, :within])
        return out_N

    def _fill(self, row: int, column: int, out_RC: np.ndarray) -> None:
        """Rows `row` and following, the columns `column` and following of each, as many at a time as memory allows."""
        starts_V1, rows_P = self._tensor.pieces.starts_V1, self._tensor.pieces.rows_P
        most = max(1, _RUN // out_RC.shape[1])
        stop = row + len(out_RC)
        while row < stop:
            after = int(np.searchsorted(starts_V1, starts_V1[row] + most, "right")) - 1
            last = min(stop, max(row + 1, after), row + most)
            pieces_Q = rows_P[starts_V1[row] : starts_V1[last]]
            part_RC, out_RC = out_RC[: last - row], out_RC[last - row :]
            starts_R1 = starts_V1[row : last + 1] - starts_V1[row]
            if self._tensor.copies:
                self._gather(pieces_Q, column, part_RC)
            else:
                self._combine(pieces_Q, starts_R1, column, part_RC)
            row = last

    def _combine(self, pieces_Q: np.ndarray, starts_R1: np.ndarray, column: int, out_RC: np.ndarray) -> None:
        tensor, columns = self._tensor, out_RC.shape[1]
        stored_QC = np.empty((len(pieces_Q), columns), tensor.source.dtype.storage)
        self._gather(pieces_Q, column, stored_QC)
        values_QC = np.empty(stored_QC.shape, np.float32)
        decode(stored_QC.reshape(-1), tensor.source.dtype, values_QC.reshape(-1))
        lacking = bool((np.diff(starts_R1) == 0).any())
        mean_C = tensor.mean_row()[column : column + columns] if lacking else np.zeros(columns)
        _mean_of_pieces(values_QC, starts_R1, np.float64(tensor.scale), mean_C, out_RC)

    def _gather(self, rows_Q: np.ndarray, column: int, out_QC: np.ndarray) -> None:
        """Columns `column` and following of these rows of the source; rows that follow one another are read in one go."""
        columns = out_QC.shape[1]
        whole = columns == self._columns and out_QC.flags.c_contiguous
        breaks = np.flatnonzero(np.diff(rows_Q) != 1) + 1 if whole else np.arange(1, len(rows_Q))
        for begin, end in pairwise([0, *breaks.tolist(), len(rows_Q)] if len(rows_Q) else []):
            part_N = out_QC[begin:end].reshape(-1)
            found_N = self._source.read(int(rows_Q[begin]) * self._columns + column, part_N)
            if found_N is not part_N:
                part_N[:] = found_N


def _read(elements: Elements, dtype: DType, start: int, count: int) -> np.ndarray:
    values_N = np.empty(count, np.float32)
    decode(elements.read(start, np.empty(count, dtype.storage)), dtype, values_N)
    return values_N


@kernel
def _add_rows(values_RD: np.ndarray, sum_D: np.ndarray) -> None:
    for row in range(values_RD.shape[0]):
        for column in range(values_RD.shape[1]):
            sum_D[column] += np.float64(values_RD[row, column])


@kernel
def _mean_of_pieces(
    values_QC: np.ndarray, starts_R1: np.ndarray, scale: np.float64, mean_C: np.ndarray, out_RC: np.ndarray
) -> None:
    """Each row the mean of its own of `values_QC` times `scale`, or `mean_C` where it has none."""
    for row in range(out_RC.shape[0]):
        first, last = starts_R1[row], starts_R1[row + 1]
        if first == last:
            for column in range(out_RC.shape[1]):
                out_RC[row, column] = np.float32(mean_C[column])
        elif last == first + 1:
            for column in range(out_RC.shape[1]):
                out_RC[row, column] = np.float32(np.float64(values_QC[first, column]) * scale)
        else:
            count = np.float64(last - first)
            for column in range(out_RC.shape[1]):
                total = np.float64(0)
                for piece in range(first, last):
                    total += np.float64(values_QC[piece, column])
                out_RC[row, column] = np.float32(total / count * scale)
