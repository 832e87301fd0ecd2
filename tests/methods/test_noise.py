from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge import InputError
from moerge.tensors.random import normal, stream_key
from tests.helpers import strategies
from tests.methods.one_tensor import merge_tensor

SIZE = 200_000


def drawn(key: np.uint64, start: int, count: int) -> np.ndarray:
    out_N = np.empty(count, np.float32)
    normal(key, start, out_N)
    return out_N


def test_the_stream_is_standard_normal_and_independent() -> None:
    stats = pytest.importorskip("scipy.stats")
    z_N = drawn(stream_key(1, "a", "b"), 0, SIZE).astype(np.float64)
    assert stats.kstest(z_N, "norm").pvalue > 1e-3
    for lag in (1, 2, 3):
        assert abs(np.mean(z_N[:-lag] * z_N[lag:])) < 5 / np.sqrt(SIZE)
    assert abs(np.mean(z_N * drawn(stream_key(1, "a", "c"), 0, SIZE))) < 5 / np.sqrt(SIZE)
    assert 4 < np.abs(z_N).max() < 7


@given(st.integers(0, 50), st.integers(0, 40))
def test_any_window_has_the_same_elements(half: int, count: int) -> None:
    key = stream_key(7, "x")
    np.testing.assert_array_equal(drawn(key, 2 * half, count), drawn(key, 0, 200)[2 * half : 2 * half + count])


@given(strategies.stacks(rows=1, exact=True), st.sampled_from([0.0, 0.5, 3.0]))
def test_it_is_the_expert_and_scaled_noise(stack: np.ndarray, scale: float) -> None:
    noise = merge_tensor("noise", None, np.zeros_like(stack), scale=1.0, seed=3)
    merged = merge_tensor("noise", None, stack, scale=scale, seed=3)
    np.testing.assert_allclose(merged, stack[0].astype(np.float64) + scale * noise.astype(np.float64), rtol=1e-6, atol=1e-5)


def test_seeds_differ() -> None:
    zeros = np.zeros((1, 64), np.float32)
    first, second = (merge_tensor("noise", None, zeros, seed=seed) for seed in (0, 1))
    assert (first != second).all()


def test_it_takes_one_expert_and_no_negative_scale() -> None:
    with pytest.raises(InputError, match="noise merges exactly 1 state dict, not 2"):
        merge_tensor("noise", None, np.ones((2, 3), np.float32))
    with pytest.raises(InputError, match="scale should be"):
        merge_tensor("noise", None, np.ones((1, 3), np.float32), scale=-1.0)
