"""Tensors whose rows come from others: read in any piece, they are what indexing whole arrays gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.tensors.dtypes import BF16, F16, F32, DType
from moerge.tensors.views.rows import MEAN, ZERO, OverwriteRows, RowSource, RowsTensor, pick_rows
from tests.helpers.tiny import decode, encode


@dataclass
class InMemory:
    """A Tensor in memory that counts how it is read."""

    stored: np.ndarray
    dtype: DType = F32
    name: str = "t"
    reads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def size(self) -> int:
        return self.stored.size

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    @property
    def files(self) -> tuple[Path, ...]:
        return (Path(self.name),)

    def open(self) -> InMemory:
        return self

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        self.reads += 1
        assert 0 <= start <= start + out_N.size <= self.size
        return self.stored.reshape(-1)[start : start + out_N.size]


def tensor(values: np.ndarray, dtype: DType = F32, name: str = "t") -> InMemory:
    return InMemory(encode(values, dtype), dtype, name)


@st.composite
def cases(draw: st.DrawFn) -> tuple[RowsTensor, np.ndarray]:
    """A tensor and its values as float32 [V, ...], row by row."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    width = draw(st.sampled_from([(), (1,), (3,), (5,)]))
    count, rows = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    types = draw(st.lists(st.sampled_from([F32, BF16, F16]), min_size=count, max_size=count))
    sources = [tensor(rng.standard_normal((draw(st.integers(1, 8)), *width), dtype=np.float32), kind) for kind in types]
    values = [decode(source.stored, source.dtype) for source in sources]
    maps = [rng.integers(-1, len(source.stored), rows).astype(np.int32) for source in sources]
    if draw(st.booleans()):
        maps = [np.arange(rows, dtype=np.int32) % len(source.stored) for source in sources]
    weights = tuple(draw(st.sampled_from([1.0, 0.5, 2.0])) for _ in sources)
    picks, expected = np.empty(rows, np.int16), np.empty((rows, *width), np.float32)
    for row in range(rows):
        having = [source for source in range(count) if maps[source][row] >= 0]
        choices = [ZERO, *having, *([MEAN] if having else [])]
        picks[row] = choice = draw(st.sampled_from(choices))
        if choice == ZERO:
            expected[row] = 0
        elif choice == MEAN:
            total = sum(weights[s] * values[s][maps[s][row]].astype(np.float64) for s in having)
            expected[row] = total / sum(weights[s] for s in having)
        else:
            expected[row] = values[choice][maps[choice][row]]
    return RowsTensor("t", tuple(sources), tuple(maps), picks, weights), expected


@given(case=cases(), data=st.data())
def test_any_piece_is_what_indexing_gives(case: tuple[RowsTensor, np.ndarray], data: st.DataObject) -> None:
    virtual, expected = case
    assert (virtual.shape, virtual.size) == (expected.shape, expected.size)
    start = data.draw(st.integers(0, expected.size))
    count = data.draw(st.integers(0, expected.size - start))
    read = virtual.open().read(start, np.empty(count, virtual.dtype.storage))
    assert np.array_equal(decode(read, virtual.dtype), expected.reshape(-1)[start : start + count])


@given(case=cases(), data=st.data(), kind=st.sampled_from([F32, BF16]))
def test_exact_rows_are_put_and_others_left(case: tuple[RowsTensor, np.ndarray], data: st.DataObject, kind: DType) -> None:
    virtual, expected = case
    marks = np.array(data.draw(st.lists(st.booleans(), min_size=len(expected), max_size=len(expected))))
    start = data.draw(st.integers(0, expected.size))
    out = np.full(data.draw(st.integers(0, expected.size - start)), 7, kind.storage)
    OverwriteRows(virtual, marks).put(start, out, kind)
    whole = np.full(expected.shape, 7, kind.storage)
    whole[marks] = encode(expected, kind)[marks]
    assert np.array_equal(out, whole.reshape(-1)[start : start + out.size])


def test_rows_that_follow_one_another_are_read_in_one_go() -> None:
    source = tensor(np.arange(4000, dtype=np.float32).reshape(1000, 4))
    rows = np.concatenate([np.arange(500, 1000), np.arange(500)]).astype(np.int32)
    virtual = RowsTensor("t", (source,), (rows,), np.zeros(1000, np.int16))
    virtual.open().read(0, np.empty(4000, np.float32))
    assert source.reads == 2


def test_the_element_type_is_the_sources_unless_something_is_computed() -> None:
    one, other = tensor(np.ones((2, 2), np.float32), BF16), tensor(np.ones((2, 2), np.float32), F32)
    rows = np.arange(2, dtype=np.int32)
    copied, computed = np.zeros(2, np.int16), np.array([0, MEAN], np.int16)
    assert RowsTensor("t", (one, one), (rows, rows), copied, (1, 1)).dtype is BF16
    assert RowsTensor("t", (one, one), (rows, rows), computed, (1, 1)).dtype is F32
    assert RowsTensor("t", (one, other), (rows, rows), copied, (1, 1)).dtype is F32


def holder(name: str, *rows: int) -> RowSource:
    index = [name.encode()[0] * 10 + max(row, 0) for row in range(8)]
    return RowSource(name, tensor(np.array(index, np.float32)[:, None], name=name), np.array(rows, np.int32))


def read_all(virtual: RowsTensor) -> list[float]:
    read = virtual.open().read(0, np.empty(virtual.size, virtual.dtype.storage))
    return [float(number) for number in decode(read, virtual.dtype)]


def test_whose_row_it_is() -> None:
    """a = 97 tens, b = 98 tens, c = 99 tens, d = 100 tens."""
    a, b, c, d = holder("a", 0, -1, -1, -1), holder("b", 1, 2, -1, -1), holder("c", 1, 2, 3, -1), holder("d", 1, 2, 3, 4)
    assert read_all(pick_rows([a, b], [c, d], [1, 1], [d])) == [970, 982, (993 + 1003) / 2, 1004]
    assert read_all(pick_rows([a], [b, c], [3, 1], [d])) == [970, (3 * 982 + 992) / 4, 993, 1004]
    assert read_all(pick_rows([a], [b, c], [1, -1], [d])) == [
        970,
        (982 + 992) / 2,
        993,
        1004,
    ]  # weights that cancel count the same


def test_only_what_is_read_counts_as_a_source() -> None:
    a, b = holder("a", 0, 1), holder("b", 0, 1)
    virtual = pick_rows([a], [b], [1], [b])
    assert [str(file) for file in virtual.files] == ["a"]
    with pytest.raises(AssertionError, match="a row that no model has"):
        pick_rows([holder("a", 0, -1)], [], [], [holder("b", 0, -1)])
