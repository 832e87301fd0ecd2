from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge import InputError, load_recipe
from tests.helpers import reference, strategies
from tests.methods.one_tensor import assert_same_bits, merge_tensor


@given(strategies.stacks())
def test_average_is_the_mean_of_the_experts_to_the_bit(theta_EN: np.ndarray) -> None:
    assert_same_bits(merge_tensor("average", None, theta_EN), reference.average(theta_EN))


@given(strategies.stacks())
def test_average_is_within_float32_rounding_of_the_truth(theta_EN: np.ndarray) -> None:
    exact_N = reference.average(theta_EN.astype(np.float64))
    largest_N = np.abs(theta_EN).max(axis=0)
    assert np.all(np.abs(merge_tensor("average", None, theta_EN) - exact_N) <= 4 * 2**-24 * largest_N + 2**-149)


@given(strategies.stacks(), st.randoms())
def test_average_does_not_depend_on_the_order_of_experts(theta_EN: np.ndarray, random: Random) -> None:
    order = random.sample(range(len(theta_EN)), len(theta_EN))
    shuffled_N = merge_tensor("average", None, theta_EN[order])
    largest = float(np.abs(theta_EN).max())
    np.testing.assert_allclose(shuffled_N, merge_tensor("average", None, theta_EN), rtol=0, atol=8 * 2**-24 * largest + 2**-149)


@given(strategies.stacks(exact=True), st.randoms())
def test_order_changes_no_bit_where_sums_are_exact(theta_EN: np.ndarray, random: Random) -> None:
    order = random.sample(range(len(theta_EN)), len(theta_EN))
    np.testing.assert_array_equal(merge_tensor("average", None, theta_EN[order]), merge_tensor("average", None, theta_EN))


@given(strategies.stacks(rows=1))
def test_one_expert_is_its_own_average(theta_EN: np.ndarray) -> None:
    assert_same_bits(merge_tensor("average", None, theta_EN), theta_EN[0])
    assert_same_bits(merge_tensor("linear", None, theta_EN), theta_EN[0])


@given(st.data(), strategies.stacks(), st.booleans())
def test_linear_is_the_weighted_sum_to_the_bit(data: st.DataObject, theta_EN: np.ndarray, normalize: bool) -> None:
    weights = data.draw(strategies.weights(len(theta_EN)))
    actual_N = merge_tensor("linear", None, theta_EN, weights=weights, normalize=normalize)
    assert_same_bits(actual_N, reference.linear(theta_EN, weights, normalize=normalize))


def test_linear_normalises_its_weights_unless_told_not_to() -> None:
    theta_EN = np.array([[1, 2], [3, -4]], np.float32)
    np.testing.assert_array_equal(merge_tensor("linear", None, theta_EN, weights=[3, 1]), np.float32([1.5, 0.5]))
    unnormalised_N = merge_tensor("linear", None, theta_EN, weights=[3, 1], normalize=False)
    np.testing.assert_array_equal(unnormalised_N, np.float32([6, 2]))


@given(st.data(), strategies.stacks(exact=True))
def test_linear_with_normalised_weights_ignores_their_size(data: st.DataObject, theta_EN: np.ndarray) -> None:
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(theta_EN), max_size=len(theta_EN)))
    small_N = merge_tensor("linear", None, theta_EN, weights=weights)
    np.testing.assert_array_equal(merge_tensor("linear", None, theta_EN, weights=[8 * w for w in weights]), small_N)


def test_average_equals_linear_with_equal_weights() -> None:
    theta_EN = np.random.default_rng(0).standard_normal((3, 101)).astype(np.float32)
    assert_same_bits(merge_tensor("linear", None, theta_EN, weights=[1, 1, 1]), merge_tensor("average", None, theta_EN))


def test_weights_that_sum_to_zero_cannot_be_normalised() -> None:
    theta_EN = np.ones((2, 3), np.float32)
    with pytest.raises(InputError, match="the weights sum to zero, so they cannot be normalized"):
        merge_tensor("linear", None, theta_EN, weights=[1, -1])
    np.testing.assert_array_equal(merge_tensor("linear", None, theta_EN, weights=[1, -1], normalize=False), np.zeros(3))


def test_the_base_of_a_moe_counts_in_the_sum_of_weights() -> None:
    recipe = {"base": "base", "experts": {"math": {"model": "math", "weight": -1}}, "merge": {"method": "linear"}, "moe": {}}
    with pytest.raises(InputError, match="the weights sum to zero, so they cannot be normalized"):
        load_recipe(recipe)
    recipe["experts"]["code"] = {"model": "code", "weight": 1}
    assert load_recipe(recipe).includes_base
    with pytest.raises(InputError, match="the weights sum to zero"):
        load_recipe({**recipe, "moe": {"include_base": False}})


def test_average_refuses_weights() -> None:
    with pytest.raises(InputError, match="average ignores weights: use 'linear', or leave them out"):
        merge_tensor("average", None, np.ones((2, 3), np.float32), weights=[1, 2])
