"""Rows made of the rows of pieces, against a slow obvious reference, whatever is read and in whatever order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.checkpoint.header import read_header
from moerge.tensors.dtypes import BF16, F16, F32, DType
from moerge.tensors.tensor import ArrayTensor, Tensor
from moerge.tokenizer import TokenAlignment, composed
from moerge.tokenizer.composed import ComposedRows
from moerge.tokenizer.pieces import COMPOSED, EXACT, LEFT
from tests.helpers.tiny import decode, encode, write_safetensors


def pieces_of(rows: list[list[int]]) -> TokenAlignment:
    counts_V = np.array([len(pieces) for pieces in rows], np.int64)
    kinds_V = np.array([LEFT, EXACT, COMPOSED], np.uint8)[np.minimum(counts_V, 2)]
    flat = np.array([row for pieces in rows for row in pieces], np.int32)
    marks_V = np.ones(len(rows), bool)
    return TokenAlignment(np.concatenate(([0], np.cumsum(counts_V))), flat, kinds_V, marks_V, ~marks_V)


def in_memory(values: np.ndarray, dtype: DType = F32) -> ArrayTensor:
    return ArrayTensor("embedding", dtype, values.shape, encode(np.ascontiguousarray(values, np.float32), dtype).reshape(-1))


def read_whole(tensor: Tensor) -> np.ndarray:
    found = tensor.open().read(0, np.full(tensor.size, 7, tensor.dtype.storage))
    return found.reshape(tensor.shape)


def reference(source: ArrayTensor, rows: list[list[int]], width: int | None, scale: float) -> np.ndarray:
    """Everything in float64, row by row, rounded to float32 at the end."""
    table = decode(source.flat, source.dtype).astype(np.float64).reshape(source.shape)
    found = np.zeros((len(rows), *((width or size) for size in source.shape[1:])))
    for number, pieces in enumerate(rows):
        total: Any = sum((table[row] for row in pieces or range(len(table))), np.zeros(source.shape[1:]))
        part = total / len(pieces or table) * scale
        if source.shape[1:]:
            found[number, : source.shape[1]] = part
        else:
            found[number] = part
    return found.astype(np.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ArrayTensor, list[list[int]], dict[str, Any]]:
    own, columns = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([BF16, F16, F32]))
    vector = draw(st.booleans()) and draw(st.booleans())
    source = in_memory(rng.standard_normal(own if vector else (own, columns)), dtype)
    kinds = draw(st.sampled_from([[1], [1, 1, 2, 5], [0, 1, 1, 3], [0]]))
    rows = [[draw(st.integers(0, own - 1)) for _ in range(draw(st.sampled_from(kinds)))] for _ in range(draw(st.integers(1, 9)))]
    if draw(st.booleans()):  # a run of rows that follow one another
        rows[1:1] = [[row] for row in range(own)]
    width = None if vector else draw(st.sampled_from([None, columns, columns + 3]))
    return source, rows, {"width": width, "scale": draw(st.sampled_from([1.0, 1.0, 2.5, -0.3]))}


@given(cases(), st.data())
def test_against_the_reference(case: tuple[ArrayTensor, list[list[int]], dict[str, Any]], data: st.DataObject) -> None:
    source, rows, settings = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, "_RUN", data.draw(st.sampled_from([1, 3, 16, 1 << 18])))
        tensor = ComposedRows("shared", source, pieces_of(rows), **settings)
        whole = read_whole(tensor)
        expected = reference(source, rows, **settings)
        found = decode(whole.reshape(-1), tensor.dtype).reshape(tensor.shape)
        np.testing.assert_array_equal(found, expected)
        computed = any(len(pieces) != 1 for pieces in rows)
        assert tensor.dtype is (F32 if computed or settings["scale"] != 1 else source.dtype)
        assert (tensor.name, tensor.size, tensor.nbytes) == ("shared", whole.size, whole.nbytes)
        elements = tensor.open()
        for _ in range(4):
            start = data.draw(st.integers(0, tensor.size))
            out_N = np.full(data.draw(st.integers(0, tensor.size - start)), 7, tensor.dtype.storage)
            assert elements.read(start, out_N) is out_N
            np.testing.assert_array_equal(out_N, whole.reshape(-1)[start : start + out_N.size])


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda dtype: dtype.name)
def test_rows_of_one_piece_are_exact(dtype: DType) -> None:
    """To the last bit, zeros of both signs, infinities and what is not a number too; also beside rows that are computed."""
    values = np.array([[0.0, -0.0, np.inf], [1e-40, -np.inf, np.nan], [1 / 3, -65504.0, 6e-8]], np.float32)
    source, own = in_memory(values, dtype), [[2], [1], [0], [1], [2]]
    copied = ComposedRows("x", source, pieces_of(own), width=4)
    assert copied.dtype is dtype and copied.shape == (5, 4)
    stored = source.flat.reshape(3, 3)
    assert read_whole(copied)[:, :3].tobytes() == stored[[2, 1, 0, 1, 2]].tobytes()
    assert not read_whole(copied)[:, 3].any()
    beside = ComposedRows("x", source, pieces_of([*own, [0, 2]]))
    assert beside.dtype is F32
    expected = decode(source.flat, dtype).reshape(3, 3)[[2, 1, 0, 1, 2]]
    assert read_whole(beside)[:5].tobytes() == expected.tobytes()


def test_sums_are_rounded_once() -> None:
    """In float32 the small parts would be lost one by one."""
    source = in_memory(np.array([[1.0], [2.0**-24], [-1.0]], np.float32))
    tensor = ComposedRows("x", source, pieces_of([[0, 1, 1, 2], [0, 1, 1]]), scale=0.5)
    assert read_whole(tensor)[:, 0].tolist() == [2.0**-26, np.float32((1 + 2.0**-23) / 6)]
    mean = ComposedRows("x", source, pieces_of([[]]))
    assert read_whole(mean)[0, 0] == np.float32(2.0**-24 / 3)


class Counting(ArrayTensor):
    """Counts the elements that are read."""

    count = 0
    most = 0

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        Counting.count += out_N.size
        Counting.most = max(Counting.most, out_N.size)
        return super().read(start, out_N)


def test_the_mean_row_is_computed_once_and_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "_RUN", 64)
    Counting.count = Counting.most = 0
    values = np.arange(1000, dtype=np.float32).reshape(125, 8)
    tensor = ComposedRows("x", Counting("embedding", F32, values.shape, values.reshape(-1)), pieces_of([[], [3], []] * 50))
    assert tensor.dtype is F32 and Counting.count == 0  # nothing is read before it is asked for
    expected = np.where((np.arange(150) % 3 == 1)[:, None], values[3], values.mean(axis=0, dtype=np.float64))
    np.testing.assert_array_equal(tensor.open().read(8, np.empty(8, np.float32)), values[3])
    assert Counting.count == 8  # no row of those read needs it
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read_whole(tensor), range(8)))
    for whole in found:
        np.testing.assert_array_equal(whole, expected.astype(np.float32))
    assert Counting.count == 8 + 1000 + 8 * 50 * 8
    assert Counting.most <= 64


def test_a_row_of_many_pieces_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "_RUN", 16)
    rng = np.random.default_rng(0)
    source = in_memory(rng.standard_normal((9, 4)))
    rows = [[1], rng.integers(0, 9, 300).tolist(), [], [2, 3]]
    np.testing.assert_array_equal(read_whole(ComposedRows("x", source, pieces_of(rows))), reference(source, rows, None, 1))


def test_from_a_file(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((40, 6), dtype=np.float32)
    write_safetensors(tmp_path / "model.safetensors", {"embedding": values})
    source = read_header(tmp_path / "model.safetensors")["embedding"]
    rows = [[row] for row in range(5, 30)] + [[3, 4], [39, 0, 39], [], [7]]
    tensor = ComposedRows("x", source, pieces_of(rows), width=8, scale=2)
    stored = ArrayTensor("x", BF16, values.shape, encode(values, BF16).reshape(-1))
    np.testing.assert_array_equal(read_whole(tensor), reference(stored, rows, 8, 2))
    assert tensor.files == source.files


def test_what_it_cannot_be() -> None:
    source = in_memory(np.ones((2, 3)))
    for changes, problem in (
        ({"pieces": pieces_of([[2]])}, "a piece without a row"),
        ({"width": 2}, "no matrix, or wider"),
        ({"source": in_memory(np.ones((2, 3, 4)))}, "neither a matrix nor a vector"),
        ({"source": in_memory(np.ones(2)), "width": 4}, "no matrix, or wider"),
    ):
        with pytest.raises(AssertionError, match=problem):
            ComposedRows(**{"name": "x", "source": source, "pieces": pieces_of([[0]]), **changes})  # type: ignore[arg-type]
