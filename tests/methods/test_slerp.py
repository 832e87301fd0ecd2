from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moerge import InputError
from tests.helpers import reference, strategies
from tests.methods.one_tensor import assert_same_bits, merge_tensor

SHARES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))


def slerp(first: object, second: object, **parameters: float) -> np.ndarray:
    return merge_tensor("slerp", None, np.array([first, second], np.float32), **parameters)


def angle(first_N: np.ndarray, second_N: np.ndarray) -> float:
    first_N, second_N = first_N.astype(np.float64), second_N.astype(np.float64)
    cosine = first_N @ second_N / np.linalg.norm(first_N) / np.linalg.norm(second_N)
    return math.acos(min(1.0, max(-1.0, cosine)))


@given(strategies.stacks(rows=2, max_size=70), SHARES)
def test_it_is_the_formula(stack: np.ndarray, t: float) -> None:
    first_N, second_N = stack.astype(np.float64)
    norms = np.linalg.norm(first_N) * np.linalg.norm(second_N)
    # where the cosine lies within rounding of the threshold, both branches are right
    assume(norms == 0 or abs(abs(first_N @ second_N) / norms - 0.9995) > 1e-12)
    tolerance = 1e-5 * float(np.abs(stack).max()) + 2**-146
    np.testing.assert_allclose(slerp(*stack, t=t), reference.slerp(first_N, second_N, t), rtol=0, atol=tolerance)


@given(strategies.stacks(rows=2))
def test_the_ends_are_the_experts(stack: np.ndarray) -> None:
    np.testing.assert_array_equal(slerp(*stack, t=0), stack[0])
    np.testing.assert_array_equal(slerp(*stack, t=1), stack[1])


@given(strategies.stacks(rows=2), SHARES)
def test_swapping_experts_and_reversing_t_is_the_same(stack: np.ndarray, t: float) -> None:
    tolerance = 1e-5 * float(np.abs(stack).max()) + 2**-146
    np.testing.assert_allclose(slerp(*stack, t=t), slerp(*stack[::-1], t=1 - t), rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [2, 15, 16, 17, 1000])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_equal_norms_are_kept_and_the_angle_is_shared_out(size: int, t: float) -> None:
    stack = np.random.default_rng(size).standard_normal((2, size))
    first_N, second_N = (stack / np.linalg.norm(stack, axis=1, keepdims=True)).astype(np.float32)
    merged_N = slerp(first_N, second_N, t=t)
    assert np.linalg.norm(merged_N.astype(np.float64)) == pytest.approx(1, abs=1e-6)
    assert angle(first_N, merged_N) == pytest.approx(t * angle(first_N, second_N), abs=1e-5)


@given(strategies.stacks(rows=1), SHARES)
def test_equal_experts_give_that_expert(stack: np.ndarray, t: float) -> None:
    (theta_N,) = stack
    tolerance = 2**-23 * float(np.abs(theta_N).max()) + 2**-148
    np.testing.assert_allclose(slerp(theta_N, theta_N, t=t), theta_N, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dot_threshold", [0.5, 0.9995, 1.0])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], [1, 2, 3]),
        ([1, 2, 2], [2, 4, 4], [1.25, 2.5, 2.5]),
        ([1, 2, 2], [-1, -2, -2], [0.5, 1, 1]),
        ([1, 2, 3], [0, 0, 0], [0.75, 1.5, 2.25]),
        ([0, 0, 0], [0, 0, 0], [0, 0, 0]),
    ],
    ids=["same", "parallel", "opposite", "one zero", "both zero"],
)
def test_it_is_linear_where_there_is_no_angle(first: list, second: list, expected: list, dot_threshold: float) -> None:
    merged_N = slerp(first, second, t=0.25, dot_threshold=dot_threshold)
    np.testing.assert_allclose(merged_N, np.float32(expected), rtol=1e-7)


def test_the_threshold_decides_between_arc_and_chord() -> None:
    first, second = [1, 0], [0.8, 0.6]
    chord_N, arc_N = slerp(first, second, dot_threshold=0.7), slerp(first, second, dot_threshold=0.9)
    np.testing.assert_allclose(chord_N, [0.9, 0.3], rtol=1e-6)
    np.testing.assert_allclose(arc_N, np.array([0.9, 0.3]) / math.hypot(0.9, 0.3), rtol=1e-6)


def test_each_tensor_is_one_vector_whatever_its_shape() -> None:
    stack = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    merged_N = slerp(*stack, t=0.3)
    assert_same_bits(slerp(*stack.reshape(2, 2, 3), t=0.3), merged_N.reshape(2, 3))


@pytest.mark.parametrize("count", [1, 3])
def test_it_takes_exactly_two_experts(count: int) -> None:
    with pytest.raises(InputError, match=f"slerp merges exactly 2 state dicts, not {count}"):
        merge_tensor("slerp", None, np.ones((count, 3), np.float32))


@pytest.mark.parametrize("t", [-0.1, 1.1])
def test_t_lies_between_the_experts(t: float) -> None:
    with pytest.raises(InputError, match=r"t should be (greater|less) than or equal to"):
        slerp([1], [2], t=t)
