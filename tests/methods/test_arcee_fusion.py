from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge import InputError
from moerge.methods import magnitude
from tests.helpers import reference, strategies
from tests.methods.one_tensor import assert_same_bits, merge_tensor


def fuse(base: np.ndarray, theta: np.ndarray, threads: int = 1) -> np.ndarray:
    return merge_tensor("arcee_fusion", base, theta[None], threads=threads)


def check(base: np.ndarray, theta: np.ndarray, merged: np.ndarray) -> None:
    """Entries away from the threshold are decided as in float64."""
    exact = base.astype(np.float64), theta.astype(np.float64)
    importance = reference.fusion_importance(*exact)
    threshold = reference.fusion_threshold(importance)
    margin = 1e-5 * np.abs(importance).max() + 1e-12
    taken, left = importance >= threshold + margin, importance < threshold - margin
    np.testing.assert_allclose(merged[taken], theta[taken], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(merged[left], base[left])
    assert ((merged == base) | np.isclose(merged, theta, rtol=1e-6, atol=1e-6)).all()


@given(st.data(), strategies.stacks(rows=2, exact=True, max_size=60))
def test_it_is_the_formula(data: st.DataObject, stack: np.ndarray) -> None:
    shaped = stack.reshape(2, -1, data.draw(strategies.columns(stack.shape[1])))
    check(*shaped, fuse(*shaped))


def models(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    base = (random.standard_normal(shape) * 0.05).astype(np.float32)
    spread = random.gamma(0.5, size=(*shape[:-1], 1)) if len(shape) > 1 else 1.0
    return base, base + (random.standard_normal(shape) * 0.01 * spread).astype(np.float32)


@pytest.mark.parametrize("shape", [(1000, 1500), (1500, 1000), (1_500_000,), (2, 750_001), (750_001, 2)])
def test_rows_of_all_lengths_across_blocks_and_chunks(shape: tuple[int, ...]) -> None:
    base, theta = models(shape)
    merged = fuse(base, theta)
    check(base, theta, merged)
    share = float((merged != base).mean())
    assert 0.01 < share < 0.4, share
    assert_same_bits(fuse(base, theta, threads=3), merged)


def test_quartiles_are_exact_whatever_the_sample_says(monkeypatch: pytest.MonkeyPatch) -> None:
    base, theta = models((300, 200))
    merged = fuse(base, theta)
    monkeypatch.setattr(magnitude, "_LARGE", 1000)
    assert_same_bits(fuse(base, theta), merged)


def test_large_weights_do_not_overflow() -> None:
    """Norms with weights of hundreds: e^x is no float64 above 709."""
    base = np.float32([[1000, 2, 3, -1000], [5, -900, 1, 900]])
    theta = base + np.float32([[1, 0.5, 0, 2], [0.25, 1, 3, 0.5]])
    check(base, theta, fuse(base, theta))


def test_what_did_not_change_stays() -> None:
    base, _ = models((8, 8))
    assert_same_bits(fuse(base, base), base)


def test_it_takes_exactly_one_expert() -> None:
    with pytest.raises(InputError, match="arcee_fusion merges exactly 1 state dict, not 2"):
        merge_tensor("arcee_fusion", np.zeros(3, np.float32), np.ones((2, 3), np.float32))
