from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from tests.helpers import reference, strategies
from tests.methods.one_tensor import assert_same_bits, merge_tensor


def taus(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


@given(st.data(), strategies.stacks(rows=4, exact=True))
def test_it_is_the_formula(data: st.DataObject, stack: np.ndarray) -> None:
    exact = stack.astype(np.float64)
    expected_N = reference.model_stock(exact[0], exact[1:])
    np.testing.assert_allclose(merge_tensor("model_stock", stack[0], stack[1:]), expected_N, rtol=1e-6, atol=1e-5)
    columns = data.draw(strategies.columns(stack.shape[1]))
    rows = exact.reshape(4, -1, columns).transpose(1, 0, 2)
    expected = np.stack([reference.model_stock(row[0], row[1:]) for row in rows])
    shaped = stack.reshape(4, -1, columns)
    np.testing.assert_allclose(
        merge_tensor("model_stock", shaped[0], shaped[1:], filter_wise=True), expected, rtol=1e-6, atol=1e-5
    )


@given(strategies.stacks(rows=3))
def test_a_vector_is_one_row(stack: np.ndarray) -> None:
    whole_N = merge_tensor("model_stock", stack[0], stack[1:])
    assert_same_bits(merge_tensor("model_stock", stack[0], stack[1:], filter_wise=True), whole_N)


@given(strategies.stacks(rows=4, exact=True), st.randoms())
def test_the_order_of_experts_hardly_matters(stack: np.ndarray, random: Random) -> None:
    shuffled = np.stack(random.sample(list(stack[1:]), 3))
    merged_N = merge_tensor("model_stock", stack[0], stack[1:])
    np.testing.assert_allclose(merge_tensor("model_stock", stack[0], shuffled), merged_N, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
@given(stack=strategies.stacks(rows=2, exact=True))
def test_one_expert_is_itself_and_experts_that_are_the_base_give_the_base(filter_wise: bool, stack: np.ndarray) -> None:
    settings = {"filter_wise": filter_wise}
    np.testing.assert_array_equal(merge_tensor("model_stock", stack[0], stack[1:], **settings), stack[1])
    np.testing.assert_array_equal(merge_tensor("model_stock", stack[0], np.stack([stack[0]] * 3), **settings), stack[0])


def test_equal_experts_are_taken_whole_and_orthogonal_ones_not_at_all() -> None:
    zeros_N = np.zeros(2, np.float32)
    np.testing.assert_array_equal(merge_tensor("model_stock", zeros_N, taus([3, 4], [3, 4])), [3, 4])
    np.testing.assert_array_equal(merge_tensor("model_stock", zeros_N, taus([3, 0], [0, 4])), zeros_N)


def test_two_experts_at_sixty_degrees() -> None:
    tau_EN = taus([1, 0], [0.5, math.sqrt(0.75)])
    ratio = 2 * 0.5 / (1 + 0.5)
    np.testing.assert_allclose(
        merge_tensor("model_stock", np.zeros(2, np.float32), tau_EN), ratio * tau_EN.mean(axis=0), rtol=1e-6
    )


@pytest.mark.parametrize("second", [[-1, 1e-3], [-1, 0], [-0.1, 1]])
def test_experts_that_point_apart_give_the_base(second: list[float]) -> None:
    base_N = np.array([5, 7], np.float32)
    np.testing.assert_array_equal(merge_tensor("model_stock", base_N, base_N + taus([1, 0], second)), base_N)


def test_each_row_has_its_own_ratio() -> None:
    zeros = np.zeros((2, 2), np.float32)
    first, second = np.float32([[3, 4], [1, 0]]), np.float32([[3, 4], [0, 1]])
    np.testing.assert_array_equal(
        merge_tensor("model_stock", zeros, np.stack([first, second]), filter_wise=True), [[3, 4], [0, 0]]
    )


def test_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"^model_stock ignores weights: use 'linear', or leave them out$"):
        moerge.merge_state_dicts({}, [{}, {}], method="model_stock", weights=[1, 2])
