from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge import InputError
from tests.helpers import strategies
from tests.methods.one_tensor import merge_tensor

LIMITS = st.one_of(st.sampled_from([0.0, 1 / 64, 1.0, 100.0]), st.floats(0, 10))


@given(strategies.stacks(rows=2, exact=True), LIMITS)
def test_it_is_mergekits_formula(stack: np.ndarray, t: float) -> None:
    base_N, theta_N = stack.astype(np.float64)
    weight_N = np.clip(t / np.maximum(np.abs(theta_N - base_N), 1e-6), 0, 1)
    wanted_N = weight_N * theta_N + (1 - weight_N) * base_N
    np.testing.assert_allclose(merge_tensor("nearswap", stack[0], stack[1:], t=t), wanted_N, rtol=1e-6, atol=1e-6)


@given(strategies.stacks(rows=2, exact=True), LIMITS)
def test_no_entry_moves_further_than_t_or_past_the_expert(stack: np.ndarray, t: float) -> None:
    moved_N = merge_tensor("nearswap", stack[0], stack[1:], t=t) - stack[0]
    tau_N = stack[1] - stack[0]
    assert (np.abs(moved_N) <= np.minimum(np.abs(tau_N), t * (1 + 1e-6)) + 1e-5).all()
    assert (moved_N * tau_N >= 0).all()


@given(strategies.stacks(rows=2, exact=True))
def test_the_ends_are_the_base_and_the_expert(stack: np.ndarray) -> None:
    np.testing.assert_array_equal(merge_tensor("nearswap", stack[0], stack[1:], t=0.0), stack[0])
    np.testing.assert_array_equal(merge_tensor("nearswap", stack[0], stack[1:], t=100.0), stack[1])


def test_it_takes_one_expert_and_no_negative_t() -> None:
    with pytest.raises(InputError, match="nearswap merges exactly 1 state dict, not 2"):
        merge_tensor("nearswap", np.zeros(3, np.float32), np.ones((2, 3), np.float32))
    with pytest.raises(InputError, match="t should be"):
        merge_tensor("nearswap", np.zeros(3, np.float32), np.ones((1, 3), np.float32), t=-1.0)
