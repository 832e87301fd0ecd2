"""Tensors with other rows than those they are read from: each row taken from one of several tensors, or their mean.

Shapes: S sources; V rows of this tensor, R of them in a row; N elements of a run. Rows that follow one another in a source are
read in one go, so tensors that differ in a few rows cost little more than stored ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from moerge.files import SourceFile
from moerge.tensors.codec import decode, encode
from moerge.tensors.dtypes import F32, DType
from moerge.tensors.tensor import Elements, Sized, Tensor

MEAN = -1
"""Instead of a source's number: the weighted mean of all sources that have the row."""
ZERO = -2
"""Instead of a source's number: a row of zeros."""
_UNDECIDED = -3
_MEAN_RUN = 1 << 18
"""Elements that are added up in one go."""
_CANCELLED = 1e-6
"""Weights whose sum is smaller than this share of their magnitudes cancel."""


@dataclass(frozen=True, eq=False)
class RowsTensor(Sized):
    """A Tensor whose row v is row `rows[s][v]` of source s = `picks_V[v]`, or the mean over all sources with a row for v.

    `rows` gives, for each source, its row for each of the V, or -1. `weights` are those of the mean, which is computed in
    float64. The element type is that of the sources where all have the same and nothing is computed, float32 elsewhere.
    """

    name: str
    sources: tuple[Tensor, ...]
    rows: tuple[np.ndarray, ...] = field(repr=False)
    picks_V: np.ndarray = field(repr=False)
    weights: tuple[float, ...] = ()

    @cached_property
    def dtype(self) -> DType:
        """The sources' element type, or float32."""
        first = self.sources[0].dtype
        same = all(source.dtype is first for source in self.sources)
        return first if same and not (self.picks_V == MEAN).any() else F32

    @property
    def shape(self) -> tuple[int, ...]:
        """V rows, of the sources' shape."""
        return (len(self.picks_V), *self.sources[0].shape[1:])

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Return the files of all sources."""
        return tuple(dict.fromkeys(file for source in self.sources for file in source.files))

    def open(self) -> RowsElements:
        """Access to the elements; a source is opened when its first row is read."""
        return RowsElements(self)


class RowsElements:
    """Elements of a tensor whose rows come from others."""

    def __init__(self, tensor: RowsTensor) -> None:
        self._tensor, self._dtype, self._width = tensor, tensor.dtype, math.prod(tensor.shape[1:])
        self._opened: dict[int, Elements] = {}

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Fill `out_N` with elements `start` and following, and return it."""
        stop, width = start + out_N.size, self._width
        for source, first, last, begin in self._runs(start // width, -(-stop // width)) if out_N.size else ():
            low, high = max(start, first * width), min(stop, last * width)
            part_N = out_N[low - start : high - start]
            if source == MEAN:
                self._mean(first, low - first * width, part_N)
            elif source == ZERO:
                part_N[:] = 0
            else:
                self._copy(source, begin * width + low - first * width, part_N)
        return out_N

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """Rows first .. last as runs: source, first and last row, and the source's first row. A row to compute is its own."""
        picks_R = self._tensor.picks_V[first:last].astype(np.int64)
        rows_R = np.full(last - first, -1, np.int64)
        for source, rows_V in enumerate(self._tensor.rows):
            chosen_R = picks_R == source
            rows_R[chosen_R] = rows_V[first:last][chosen_R]
        breaks = (np.diff(picks_R) != 0) | (np.diff(rows_R) != 1)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), last - first]
        for begin, end in pairwise(edges):
            yield int(picks_R[begin]), first + begin, first + end, int(rows_R[begin])

    def _copy(self, source: int, start: int, out_N: np.ndarray) -> None:
        if self._tensor.sources[source].dtype is self._dtype:
            self._read(source, start, out_N)
        else:
            self._decoded(source, start, out_N)

    def _mean(self, row: int, offset: int, out_N: np.ndarray) -> None:
        having = [source for source, rows_V in enumerate(self._tensor.rows) if rows_V[row] >= 0]
        weights = [self._tensor.weights[source] for source in having]
        if abs(math.fsum(weights)) <= _CANCELLED * math.fsum(map(abs, weights)):  # then each counts the same
            weights = [1.0] * len(having)
        sum_N, value_N = np.zeros(out_N.size), np.empty(out_N.size, np.float32)
        for source, weight in zip(having, weights, strict=True):
            self._decoded(source, int(self._tensor.rows[source][row]) * self._width + offset, value_N)
            with np.errstate(all="ignore"):  # what is not finite is reported by whoever reads it
                sum_N += np.float64(weight) * value_N
        with np.errstate(all="ignore"):
            out_N[:] = sum_N / math.fsum(weights)

    def _decoded(self, source: int, start: int, out_N: np.ndarray) -> None:
        dtype = self._tensor.sources[source].dtype
        stored_N = np.empty(out_N.size, dtype.storage)
        self._read(source, start, stored_N)
        decode(stored_N, dtype, out_N)

    def _read(self, source: int, start: int, out_N: np.ndarray) -> None:
        if source not in self._opened:
            self._opened[source] = self._tensor.sources[source].open()
        found_N = self._opened[source].read(start, out_N)
        if found_N is not out_N:
            out_N[:] = found_N


@dataclass(frozen=True, eq=False)
class OverwriteRows:
    """Rows of a merged tensor that are those of `tensor`, to the last bit, whatever the method: those marked in `exact_V`."""

    tensor: RowsTensor
    exact_V: np.ndarray = field(repr=False)

    def put(self, start: int, out_N: np.ndarray, dtype: DType) -> None:
        """Overwrite what belongs to such rows in `out_N`, elements `start` and following of the merged tensor as `dtype`."""
        width = math.prod(self.tensor.shape[1:])
        first, stop = start // width if width else 0, start + out_N.size
        marks_R = self.exact_V[first : -(-stop // width)] if width else self.exact_V[:0]
        if not marks_R.any():
            return
        elements = self.tensor.open()
        for begin, end in _spans(marks_R):
            low, high = max(start, (first + begin) * width), min(stop, (first + end) * width)
            stored_N = elements.read(low, np.empty(high - low, self.tensor.dtype.storage))
            part_N = out_N[low - start : high - start]
            if self.tensor.dtype is dtype:
                part_N[:] = stored_N
            else:
                values_N = np.empty(stored_N.size, np.float32)
                decode(stored_N, self.tensor.dtype, values_N)
                encode(values_N, dtype, part_N)


@dataclass(frozen=True, eq=False)
class MeanRow(Sized):
    """A Tensor of one row: the mean of all rows of another one, in float32, computed where it is opened."""

    of: Tensor

    @property
    def name(self) -> str:
        """The other one's name."""
        return self.of.name

    @property
    def dtype(self) -> DType:
        """float32."""
        return F32

    @property
    def shape(self) -> tuple[int, ...]:
        """One row."""
        return (1, *self.of.shape[1:])

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The other one's files."""
        return self.of.files

    def open(self) -> _Row:
        """Read the other one once, and add up its rows in float64."""
        sum_D = np.zeros(self.size)
        width, elements = max(1, self.size), self.of.open()
        stored_N = np.empty(max(1, _MEAN_RUN // width) * width, self.of.dtype.storage)
        values_N = np.empty(stored_N.size, np.float32)
        for start in range(0, self.of.size, stored_N.size):
            count = min(stored_N.size, self.of.size - start)
            decode(elements.read(start, stored_N[:count]), self.of.dtype, values_N[:count])
            sum_D += values_N[:count].reshape(-1, width).sum(axis=0, dtype=np.float64)
        return _Row((sum_D / self.of.shape[0]).astype(np.float32))


@dataclass(frozen=True, eq=False)
class _Row:
    values_D: np.ndarray

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Copy elements `start` and following into `out_N`, and return it."""
        out_N[:] = self.values_D[start : start + out_N.size]
        return out_N


def with_mean_rows(tensor: Tensor, count: int) -> RowsTensor:
    """A tensor with so many more rows at its end, each the mean of all others."""
    rows = tensor.shape[0]
    more_V = np.arange(rows + count) >= rows
    own_V = np.where(more_V, -1, np.arange(rows + count)).astype(np.int32)
    return RowsTensor(tensor.name, (tensor, MeanRow(tensor)), (own_V, np.where(more_V, 0, -1)), more_V.astype(np.int16))


def _spans(marks_R: np.ndarray) -> Iterator[tuple[int, int]]:
    """The runs of what is marked."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], marks_R, [False]))))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


class RowSource(NamedTuple):
    """A model's tensor, and its row for each of the result's V rows, or -1 where it has none; without a tensor zeros."""

    model: str
    tensor: Tensor | None
    rows_V: np.ndarray


def pick_rows(
    chain: Sequence[RowSource], donors: Sequence[RowSource], weights: Sequence[float], last: Sequence[RowSource]
) -> RowsTensor:
    """Rows of the first in `chain` that has them; else the weighted mean of the `donors` that do; else of the first in `last`.

    A row that one donor alone has is copied from it. The tensor gets the name that it has in the first model.
    """
    holders = {holder.model: holder for holder in (*chain, *donors, *last)}
    numbers = {model: ZERO if holder.tensor is None else number for number, (model, holder) in enumerate(holders.items())}
    rows_DV = [donor.rows_V for donor in donors]
    picks_V = np.full(len(last[0].rows_V), _UNDECIDED, np.int16)
    for model, _, rows_V in chain:
        picks_V[(picks_V == _UNDECIDED) & (rows_V >= 0)] = numbers[model]
    picks_V[(picks_V == _UNDECIDED) & (count_holders(rows_DV) > 1)] = MEAN
    for model, _, rows_V in (*donors, *last):
        picks_V[(picks_V == _UNDECIDED) & (rows_V >= 0)] = numbers[model]
    assert not (picks_V == _UNDECIDED).any(), "the result has a row that no model has"
    given = {donor.model: weight for donor, weight in zip(donors, weights, strict=True)}
    name = next(holder.tensor.name for holder in holders.values() if holder.tensor is not None)
    return _of_used(name, list(holders.values()), given, picks_V)


def _of_used(name: str, holders: Sequence[RowSource], given: Mapping[str, float], picks_V: np.ndarray) -> RowsTensor:
    """Return the files of those sources alone that something is taken from; only those with a given weight take part in a
    mean.
    """
    averaged_V = picks_V == MEAN
    used = [number for number, h in enumerate(holders) if (picks_V == number).any() or (averaged_V.any() and h.model in given)]
    renumbered = np.full(len(holders), _UNDECIDED, np.int16)
    renumbered[used] = np.arange(len(used))
    picked = [(holder, holder.tensor) for number in used if (holder := holders[number]).tensor is not None]
    rows = [h.rows_V if h.model in given else np.where(averaged_V, np.int32(-1), h.rows_V) for h, _ in picked]
    return RowsTensor(
        name,
        tuple(tensor for _, tensor in picked),
        tuple(rows),
        np.where(picks_V < 0, picks_V, renumbered[np.maximum(picks_V, 0)]),
        tuple(given.get(h.model, 0.0) for h, _ in picked),
    )


def count_holders(rows_SV: Sequence[np.ndarray]) -> np.ndarray:
    """Count the models that have each of the rows, [V]."""
    return np.sum([rows_V >= 0 for rows_V in rows_SV], axis=0) if rows_SV else np.zeros((), np.int64)
