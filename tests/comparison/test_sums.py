"""The pass over task vectors: exact where it can be, and the same whatever the size of blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.comparison import sums
from moerge.comparison.similarity import Region, _expert, _pair
from moerge.methods.average import Average
from moerge.methods.ties import Ties
from moerge.operations.operations import Merge
from moerge.tensors.dtypes import F32
from moerge.tensors.source import Source
from moerge.tensors.tensor import ArrayTensor
from tests.helpers.strategies import stacks, weights

REGION = Region("model", None, "all")


def measured(tau_EN: np.ndarray, base_N: np.ndarray | None = None, lowest_E=None, weights=None) -> sums.TensorSums:
    """The sums of one tensor, given task vectors (or parameters, without a base) as a single block."""

    def source(name: str) -> Source:
        return Source(name, ArrayTensor("w", F32, (tau_EN.shape[1],), np.zeros(tau_EN.shape[1], np.float32)))

    experts = tuple(source(f"e{k}") for k in range(len(tau_EN)))
    factors = tuple(weights or [1.0] * len(tau_EN))
    method, base = (Average(), None) if base_N is None else (Ties(), source("base"))
    operation = Merge(method, experts, factors, base)
    statistic = sums.statistic(operation, None if lowest_E is None else np.array(lowest_E, np.float32))
    total = statistic.zeros()
    statistic.add(np.ascontiguousarray(tau_EN), total, *(() if base_N is None else (base_N,)))
    return sums.read(operation, total)


def only_pair(tau_EN: np.ndarray, base_N: np.ndarray | None = None):
    return _pair(REGION, "e0", "e1", measured(tau_EN, base_N).pairs["e0", "e1"])


SIZES = [1, 7, 511, 512, 513, 4096, 4097, 13_001]


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_of_float64_arrays(size: int) -> None:
    rng = np.random.default_rng(size)
    tau_EN = rng.standard_normal((3, size), dtype=np.float32) * (rng.random((3, size)) < 0.8).astype(np.float32)
    base_N = rng.standard_normal(size, dtype=np.float32)
    found = measured(tau_EN, base_N, [0.3, 0.3, 0.3])
    exact_EN, base = tau_EN.astype(np.float64), base_N.astype(np.float64)
    kept_EN = np.where(np.abs(tau_EN) >= np.float32(0.3), tau_EN, 0).astype(np.float32)
    votes_N = (kept_EN[0] + kept_EN[1]) + kept_EN[2] >= 0
    for k, mine in enumerate(found.experts.values()):
        assert (mine.parameters, mine.changed) == (size, np.count_nonzero(tau_EN[k]))
        won_N = (kept_EN[k] >= 0) == votes_N
        wanted = [
            base @ base,
            base @ exact_EN[k],
            exact_EN[k] @ exact_EN[k],
            np.abs(exact_EN[k]).sum(),
            np.abs(kept_EN[k]).sum(dtype=np.float64),
            np.abs(kept_EN[k]).astype(np.float64)[won_N].sum(),
            exact_EN[k] @ exact_EN.mean(axis=0),
        ]
        values = [mine.base_square, mine.base_dot, mine.square, mine.mass, mine.kept, mine.elected, mine.averaged]
        np.testing.assert_allclose(values, wanted, rtol=1e-12, atol=1e-12 * size)
    for (a, b), both in found.pairs.items():
        i, j = int(a[1:]), int(b[1:])
        product_N, theta_EN = exact_EN[i] * exact_EN[j], exact_EN + base
        assert (both.conflicts, both.both) == ((product_N < 0).sum(), (product_N != 0).sum())
        wanted = [product_N.sum(), np.abs(product_N).sum(), theta_EN[i] @ theta_EN[j], theta_EN[i] @ theta_EN[i]]
        np.testing.assert_allclose(
            [both.dot, both.weight, both.theta_dot, both.theta_square_a], wanted, rtol=1e-12, atol=1e-12 * size
        )
    assert list(found.pairs) == [("e0", "e1"), ("e0", "e2"), ("e1", "e2")]


def test_entries_at_the_threshold_are_kept_as_ties_keeps_them() -> None:
    (mine,) = measured(np.array([[0.5, -0.25, 0.125]], np.float32), np.ones(3, np.float32), [0.25]).experts.values()
    assert (mine.mass, mine.kept, mine.elected) == (0.875, 0.75, 0.75)


def test_denormal_conflicts_count() -> None:
    """Their product is no float32 but a float64."""
    tiny = np.float32(2**-149)
    pair = only_pair(np.array([[tiny, 1], [-tiny, 1]], np.float32), np.ones(2, np.float32))
    assert (pair.sign_conflict, pair.sign_conflict_changed) == (0.5, 0.5)


@given(stacks(rows=1))
def test_identical_experts(tau_EN: np.ndarray) -> None:
    pair = only_pair(np.repeat(tau_EN, 2, axis=0), np.ones(tau_EN.shape[1], np.float32))
    changed = np.any(tau_EN != 0)
    assert pair.cosine == (pytest.approx(1, abs=1e-15) if changed else None)
    assert (pair.sign_conflict, pair.distance) == (0, 0)
    assert (pair.sign_conflict_changed, pair.sign_conflict_weighted) == ((0, 0) if changed else (None, None))


@given(stacks(rows=1))
def test_opposite_experts(tau_EN: np.ndarray) -> None:
    pair = only_pair(np.concatenate([tau_EN, -tau_EN]), np.ones(tau_EN.shape[1], np.float32))
    changed = np.count_nonzero(tau_EN)
    assert pair.cosine == (pytest.approx(-1, abs=1e-15) if changed else None)
    assert pair.sign_conflict == changed / tau_EN.size
    assert (pair.sign_conflict_changed, pair.sign_conflict_weighted) == ((1, 1) if changed else (None, None))


@given(stacks(rows=3), st.data())
def test_bounds_and_shares(stack: np.ndarray, data: st.DataObject) -> None:
    """Whatever is drawn: figures stay in their ranges, TIES' shares add up to one, a positive scale changes no cosine."""
    lowest, factors = float(np.median(np.abs(stack[1:]))), data.draw(weights(2))
    found = measured(stack[1:], np.ascontiguousarray(stack[0]), [lowest, lowest], factors)
    for name, mine in found.experts.items():
        row = _expert(REGION, name, mine, True)
        if mine.mass:
            assert row.trimmed + row.outvoted + row.survives == pytest.approx(1)
            assert min(row.trimmed, row.outvoted, row.survives) >= 0
    pair = _pair(REGION, "e0", "e1", found.pairs["e0", "e1"])
    assert pair.cosine is None or -1 <= pair.cosine <= 1
    assert 0 <= pair.sign_conflict <= (pair.sign_conflict_changed or 0) <= 1
    assert pair.sign_conflict_weighted is None or 0 <= pair.sign_conflict_weighted <= 1
    doubled = only_pair(stack[1:] * np.array([[2], [1]], np.float32), np.ascontiguousarray(stack[0]))
    assert doubled.cosine == (None if pair.cosine is None else pytest.approx(pair.cosine, abs=1e-12))


def test_without_a_base_parameters_are_compared() -> None:
    found = measured(np.array([[3, 4], [4, 3]], np.float32))
    pair, row = _pair(REGION, "e0", "e1", found.pairs["e0", "e1"]), _expert(REGION, "e0", found.experts["e0"], False)
    assert (pair.cosine, pair.parameter_cosine) == (0.96, 0.96)
    assert (row.norm, row.relative_norm, row.survives) == (5, None, None)
    assert pair.relative_distance == pytest.approx(2**0.5 / 5)
