"""Tensors stored as codes with scales for blocks of them: FP8, MXFP4 and NVFP4, decoded where they are read.

An element is table[code] * scale of its block, computed in float32 and rounded once, as transformers and compressed-tensors do.
Shapes: matrices of R rows and C columns, one after the other; scales of G rows and J columns for each; N elements of a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moerge.files import SourceFile
from moerge.tensors.codec import encode
from moerge.tensors.dtypes import DType
from moerge.tensors.kernels import kernel
from moerge.tensors.minifloat import E2M1, read_scales, table_of
from moerge.tensors.tensor import Sized, Tensor

_RUN = 1 << 16
"""Elements decoded at a time: their float32 values stay in the second-level cache."""
_STRIP = 64
"""Columns of a matrix that are decoded at a time where they become rows."""


@dataclass(frozen=True)
class Codes:
    """Matrices as they are stored: `codes` of one byte an element, or of two elements where `packed`, the lower half first.

    `shape` counts their elements; `scales` has `grid` (rows, columns) for each matrix, each for a block of `block`. All are
    multiplied by `factor`, a tensor of one element, or divided by it.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    grid: tuple[int, int]
    block: tuple[int, int]
    packed: bool = False
    factor: Tensor | None = None
    divides: bool = False

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files of codes and scales."""
        return tuple(dict.fromkeys((*self.codes.files, *self.scales.files, *(self.factor.files if self.factor else ()))))

    @cached_property
    def table(self) -> np.ndarray:
        """The values of the codes."""
        return E2M1 if self.packed else table_of(self.codes.dtype.name)

    @property
    def per_byte(self) -> int:
        """Elements in a byte."""
        return 2 if self.packed else 1


@dataclass(frozen=True)
class Dequantized(Sized):
    """A Tensor of `dtype`: the elements of `stored`, each matrix transposed where `transposed`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    stored: Codes
    transposed: bool = False

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files of codes and scales."""
        return self.stored.files

    @property
    def working_bytes(self) -> int:
        """Memory for each reader beside the blocks: one matrix of codes with its scales where it is transposed."""
        if not self.transposed:
            return 0
        rows, columns = self.stored.shape[-2:]
        return rows * columns // self.stored.per_byte + 4 * math.prod(self.stored.grid) + 8 * _STRIP * rows

    def open(self) -> DequantizedElements:
        """Access to the elements."""
        return DequantizedElements(self)


class DequantizedElements:
    """Elements of a tensor stored as codes."""

    def __init__(self, tensor: Dequantized) -> None:
        self._tensor, self._stored, self._codes = tensor, tensor.stored, tensor.stored.codes.open()
        self._rows, self._columns = tensor.stored.shape[-2:]
        self._matrix: tuple[int, np.ndarray, np.ndarray] | None = None
        self._strip: tuple[tuple[int, int], np.ndarray] | None = None

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Decode elements `start` and following into `out_N`, and return it."""
        if self._tensor.transposed:
            return self._read_strips(start, out_N)
        for begin in range(0, out_N.size, _RUN):
            part_N = out_N[begin : begin + _RUN]
            encode(self._in_order(start + begin, part_N.size), self._tensor.dtype, part_N)
        return out_N

    def _in_order(self, start: int, count: int) -> np.ndarray:
        stored, rows = self._stored, self._rows
        first = self._grid_row(start // self._columns)
        scales_GJ = self._scales(first, self._grid_row((start + count - 1) // self._columns) + 1)
        out_N = np.empty(count, np.float32)
        _decode_rows(
            self._bytes(start, start + count), stored.packed, stored.table, scales_GJ, first, stored.grid[0], stored.block,
            start, rows, self._columns, out_N,
        )  # fmt: skip
        return out_N

    def _grid_row(self, row: int) -> int:
        matrix, inner = divmod(row, self._rows)
        return matrix * self._stored.grid[0] + inner // self._stored.block[0]

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        """Codes of elements start .. stop; where two share a byte, of whole bytes."""
        per_byte = self._stored.per_byte
        first, last = start // per_byte, -(-stop // per_byte)
        return self._codes.read(first, np.empty(last - first, self._stored.codes.dtype.storage)).view(np.uint8)

    def _scales(self, first: int, stop: int) -> np.ndarray:
        columns = self._stored.grid[1]
        scales_GJ = read_scales(self._stored.scales, first * columns, stop * columns).reshape(-1, columns)
        factor = self._stored.factor
        if factor is None:
            return scales_GJ
        value = read_scales(factor, 0, 1)[0]
        with np.errstate(all="ignore"):  # what is not finite is reported by whoever reads it
            (np.divide if self._stored.divides else np.multiply)(scales_GJ, value, out=scales_GJ)
        return scales_GJ

    def _read_strips(self, start: int, out_N: np.ndarray) -> np.ndarray:
        matrix_size, strip_size = self._rows * self._columns, self._rows * _STRIP
        done = 0
        while done < out_N.size:
            matrix, inner = divmod(start + done, matrix_size)
            strip, offset = divmod(inner, strip_size)
            part_N = self._decoded_strip(matrix, strip)[offset : offset + out_N.size - done]
            out_N[done : done + part_N.size] = part_N
            done += part_N.size
        return out_N

    def _decoded_strip(self, matrix: int, strip: int) -> np.ndarray:
        """Columns of a stored matrix as rows, flat: decoded once for all reads that follow one another."""
        if self._strip is None or self._strip[0] != (matrix, strip):
            codes, scales_GJ = self._whole(matrix)
            first = strip * _STRIP
            values_CR = np.empty((min(_STRIP, self._columns - first), self._rows), np.float32)
            stored = self._stored
            _decode_columns(codes, stored.packed, stored.table, scales_GJ, stored.block, first, self._columns, values_CR)
            decoded_N = np.empty(values_CR.size, self._tensor.dtype.storage)
            encode(values_CR.reshape(-1), self._tensor.dtype, decoded_N)
            self._strip = (matrix, strip), decoded_N
        return self._strip[1]

    def _whole(self, matrix: int) -> tuple[np.ndarray, np.ndarray]:
        """A stored matrix with its scales, read once for all blocks of it that follow one another."""
        if self._matrix is None or self._matrix[0] != matrix:
            size, rows = self._rows * self._columns, self._stored.grid[0]
            codes = self._bytes(matrix * size, (matrix + 1) * size)
            self._matrix = matrix, codes, self._scales(matrix * rows, (matrix + 1) * rows)
        return self._matrix[1:]


@kernel
def _decode_rows(
    codes: np.ndarray,
    packed: bool,
    table: np.ndarray,
    scales_GJ: np.ndarray,
    first: int,
    grid_rows: int,
    block: tuple[int, int],
    start: int,
    rows: int,
    columns: int,
    out_N: np.ndarray,
) -> None:
    """Elements `start` and following in their stored order; `first` is the grid's row that `scales_GJ` begins with."""
    half = start % 2
    done = 0
    while done < out_N.size:
        row, column = (start + done) // columns, (start + done) % columns
        scale_J = scales_GJ[row // rows * grid_rows + row % rows // block[0] - first]
        end = done + min(columns - column, out_N.size - done)
        while done < end:
            stop = min(end, done + block[1] - column % block[1])
            scale = scale_J[column // block[1]]
            column += stop - done
            if packed:
                for i in range(done, stop):
                    place = half + i
                    out_N[i] = table[(codes[place >> 1] >> ((place & 1) << 2)) & 15] * scale
            else:
                for i in range(done, stop):
                    out_N[i] = table[codes[i]] * scale
            done = stop


@kernel
def _decode_columns(
    codes: np.ndarray,
    packed: bool,
    table: np.ndarray,
    scales_GJ: np.ndarray,
    block: tuple[int, int],
    first: int,
    columns: int,
    out_CR: np.ndarray,
) -> None:
    """Columns `first` and following of one matrix as rows."""
    for r in range(out_CR.shape[1]):
        scale_J, begin = scales_GJ[r // block[0]], r * columns + first
        for c in range(out_CR.shape[0]):
            place = begin + c
            code = (codes[place >> 1] >> ((place & 1) << 2)) & 15 if packed else codes[place]
            out_CR[c, r] = table[code] * scale_J[(first + c) // block[1]]
