from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge import InputError
from tests.helpers import reference, strategies
from tests.methods.one_tensor import assert_same_bits, merge_tensor

TASK_VECTOR_METHODS = {
    "task_arithmetic": {},
    "ties": {"density": 1.0},
    "ties trimmed": {"density": 0.3},
    "dare": {"density": 1.0},
    "dare dropping": {"density": 0.3},
}


@given(st.data(), strategies.stacks(rows=3), strategies.scales(), st.booleans())
def test_it_is_the_formula_to_the_bit(data: st.DataObject, stack: np.ndarray, scale: float, normalize: bool) -> None:
    weights = data.draw(strategies.weights(2))
    options = {"scale": scale, "normalize": normalize}
    actual_N = merge_tensor("task_arithmetic", stack[0], stack[1:], weights=weights, **options)
    assert_same_bits(actual_N, reference.task_arithmetic(stack[0], stack[1:], weights, **options))


@given(strategies.stacks(rows=4), strategies.scales())
def test_it_is_within_float32_rounding_of_the_truth(stack: np.ndarray, scale: float) -> None:
    exact = stack.astype(np.float64)
    expected_N = reference.task_arithmetic(exact[0], exact[1:], [1, 1, 1], scale=scale)
    tolerance_N = 32 * 2**-24 * np.abs(stack).max(axis=0) * (1 + abs(scale)) + 2**-146
    assert np.all(np.abs(merge_tensor("task_arithmetic", stack[0], stack[1:], scale=scale) - expected_N) <= tolerance_N)


@pytest.mark.parametrize("name", TASK_VECTOR_METHODS)
@given(strategies.stacks(), strategies.scales())
def test_experts_equal_to_the_base_give_the_base(name: str, theta_EN: np.ndarray, scale: float) -> None:
    base_N = theta_EN[0]
    same_EN = np.tile(base_N, (len(theta_EN), 1))
    merged_N = merge_tensor(name.split()[0], base_N, same_EN, scale=scale, **TASK_VECTOR_METHODS[name])
    np.testing.assert_array_equal(merged_N, base_N)


@pytest.mark.parametrize("name", TASK_VECTOR_METHODS)
@given(strategies.stacks(rows=3))
def test_scale_zero_gives_the_base(name: str, stack: np.ndarray) -> None:
    merged_N = merge_tensor(name.split()[0], stack[0], stack[1:], scale=0, **TASK_VECTOR_METHODS[name])
    np.testing.assert_array_equal(merged_N, stack[0])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare"])
@given(strategies.stacks(rows=2, exact=True))
def test_one_expert_at_density_one_and_scale_one_is_itself(method: str, stack: np.ndarray) -> None:
    merged_N = merge_tensor(method, stack[0], stack[1:], scale=1, **TASK_VECTOR_METHODS[method])
    np.testing.assert_array_equal(merged_N, stack[1])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare"])
@given(strategies.stacks(rows=2))
def test_one_expert_is_itself_up_to_the_rounding_of_its_task_vector(method: str, stack: np.ndarray) -> None:
    merged_N = merge_tensor(method, stack[0], stack[1:], scale=1, **TASK_VECTOR_METHODS[method])
    assert np.all(np.abs(merged_N - stack[1].astype(np.float64)) <= 2 * 2**-23 * np.abs(stack).max(axis=0))


@given(strategies.stacks(rows=5, exact=True))
def test_scale_one_over_the_number_of_experts_is_the_average(stack: np.ndarray) -> None:
    merged_N = merge_tensor("task_arithmetic", stack[0], stack[1:], scale=1 / 4)
    np.testing.assert_array_equal(merged_N, merge_tensor("average", None, stack[1:]))


@given(strategies.stacks(rows=2, exact=True))
def test_a_negative_weight_moves_away_from_the_expert(stack: np.ndarray) -> None:
    merged_N = merge_tensor("task_arithmetic", stack[0], stack[1:], weights=[-1], scale=1)
    np.testing.assert_array_equal(merged_N, 2 * stack[0] - stack[1])


def test_the_default_scale_is_mergemes_one_third() -> None:
    merged_N = merge_tensor("task_arithmetic", np.zeros(1, np.float32), np.full((1, 1), 3, np.float32))
    np.testing.assert_array_equal(merged_N, [np.float32(3) * np.float32(1 / 3)])


def test_weights_that_sum_to_zero_cannot_be_normalised() -> None:
    zeros_N, ones_EN = np.zeros(3, np.float32), np.ones((2, 3), np.float32)
    with pytest.raises(InputError, match="the weights sum to zero"):
        merge_tensor("task_arithmetic", zeros_N, ones_EN, weights=[1, -1], normalize=True)
    with pytest.raises(InputError, match="the weights sum to zero"):
        merge_tensor("dare", zeros_N, ones_EN, weights=[1, -1], aggregate="mean")
    merged_N = merge_tensor("dare", zeros_N, ones_EN, weights=[1, -1], aggregate="mean", elect="sign", density=1, scale=1)
    np.testing.assert_array_equal(merged_N, np.ones(3))
