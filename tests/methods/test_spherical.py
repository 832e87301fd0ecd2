from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from tests.helpers import reference, strategies
from tests.methods.one_tensor import assert_same_bits, merge_tensor

POSITIVE = st.floats(0.0625, 4, width=32)
METHODS = ("nuslerp", "multislerp", "karcher")


def merge(method: str, theta_EN: np.ndarray, weights: object = None, **settings: object) -> np.ndarray:
    return merge_tensor(method, None, theta_EN, weights=weights, origin="zero", **settings)


def cosines(theta_EN: np.ndarray) -> np.ndarray:
    exact_EN = theta_EN.astype(np.float64)
    norms_E = np.linalg.norm(exact_EN, axis=1)
    inverse_E = np.divide(1, norms_E, out=np.zeros_like(norms_E), where=norms_E > 0)
    return (exact_EN @ exact_EN.T) * np.outer(inverse_E, inverse_E)


def tolerance(theta_EN: np.ndarray, stretch: float = 1) -> float:
    return 4e-6 * stretch * float(np.linalg.norm(theta_EN.astype(np.float64))) + 2**-140


def numbers(count: int) -> st.SearchStrategy[list[float]]:
    return st.lists(POSITIVE, min_size=count, max_size=count)


@given(strategies.stacks(rows=2, exact=True), numbers(2))
def test_nuslerp_is_the_formula(stack: np.ndarray, weights: list[float]) -> None:
    cosine = cosines(stack)[0, 1]
    assume(cosine > -0.999)  # beyond, the arc's coefficients are so large that they amplify rounding
    wanted_N = reference.nuslerp(*stack.astype(np.float64), weights[1] / sum(weights))
    np.testing.assert_allclose(merge("nuslerp", stack, weights), wanted_N, rtol=0, atol=tolerance(stack, 50))


@pytest.mark.parametrize("vectors", ["row", "column"])
@given(data=st.data(), stack=strategies.stacks(rows=2, exact=True))
def test_nuslerp_of_rows_and_columns_is_that_of_each(data: st.DataObject, vectors: str, stack: np.ndarray) -> None:
    columns = data.draw(strategies.columns(stack.shape[1]))
    shaped = stack.reshape(2, -1, columns)
    merged = merge("nuslerp", shaped, [1, 3], vectors=vectors)
    if vectors == "column":
        shaped, merged = shaped.swapaxes(1, 2), merged.T
    for first_C, second_C, actual_C in zip(*shaped, merged, strict=True):
        assume(cosines(np.stack([first_C, second_C]))[0, 1] > -0.999)
        wanted_C = reference.nuslerp(first_C.astype(np.float64), second_C.astype(np.float64), 0.75)
        np.testing.assert_allclose(actual_C, wanted_C, rtol=0, atol=tolerance(stack, 50))


@pytest.mark.parametrize("vectors", ["tensor", "row", "column"])
def test_nuslerp_of_a_tensor_of_several_blocks(vectors: str) -> None:
    """Rows that lie across blocks and chunks, whatever the threads."""
    stack = np.random.default_rng(0).standard_normal((2, 1001, 1100)).astype(np.float32)
    merged, *others = (merge("nuslerp", stack, [1, 1], vectors=vectors, threads=threads) for threads in (1, 2, 3))
    exact = stack.astype(np.float64)
    axis = {"tensor": (1, 2), "row": 2, "column": 1}[vectors]
    dots = (exact[0] * exact[1]).sum(axis=None if axis == (1, 2) else axis - 1, keepdims=True)
    norms = [np.sqrt((one * one).sum(axis=None if axis == (1, 2) else axis - 1, keepdims=True)) for one in exact]
    angle = np.arccos(dots / norms[0] / norms[1])
    np.testing.assert_allclose(merged, np.sin(angle / 2) / np.sin(angle) * (exact[0] + exact[1]), rtol=2e-6, atol=1e-6)
    for other in others:
        assert_same_bits(other, merged)


def test_columns_of_more_than_two_axes_run_along_the_first() -> None:
    stack = np.random.default_rng(1).standard_normal((2, 5, 3, 4)).astype(np.float32)
    flat = merge("nuslerp", stack.reshape(2, 5, 12), vectors="column")
    assert_same_bits(merge("nuslerp", stack, vectors="column"), flat.reshape(5, 3, 4))
    assert_same_bits(
        merge("nuslerp", stack, vectors="row"), merge("nuslerp", stack.reshape(2, 15, 4), vectors="row").reshape(5, 3, 4)
    )


@pytest.mark.parametrize("vectors", ["row", "column"])
def test_a_vector_is_one_vector(vectors: str) -> None:
    stack = np.random.default_rng(2).standard_normal((2, 100)).astype(np.float32)
    assert_same_bits(merge("nuslerp", stack, vectors=vectors), merge("nuslerp", stack))


@pytest.mark.parametrize("factor", [2.0, -2.0, 0.0])
def test_nuslerp_is_linear_where_there_is_no_angle(factor: float) -> None:
    first_N = np.float32([1, 2, -2])
    merged_N = merge("nuslerp", np.stack([first_N, np.float32(factor) * first_N]), [3, 1])
    np.testing.assert_allclose(merged_N, (0.75 + 0.25 * factor) * first_N, rtol=1e-6, atol=1e-7)


@given(strategies.stacks(exact=True), st.data())
def test_multislerp_is_mergekits_steps(stack: np.ndarray, data: st.DataObject) -> None:
    weights = data.draw(numbers(len(stack)))
    share_E = np.array(weights) / sum(weights)
    length = math.sqrt(max(0, share_E @ cosines(stack) @ share_E))
    assume(length == 0 or length > 1e-3)
    wanted_N = reference.multislerp(stack.astype(np.float64), weights)
    np.testing.assert_allclose(
        merge("multislerp", stack, weights), wanted_N, rtol=0, atol=tolerance(stack, 1 / max(length, 0.5e-1))
    )


def test_multislerp_has_the_mean_length() -> None:
    stack = np.random.default_rng(3).standard_normal((3, 1000)).astype(np.float32) * np.float32([[1], [2], [5]])
    merged_N = merge("multislerp", stack, [1, 1, 2])
    norms_E = np.linalg.norm(stack.astype(np.float64), axis=1)
    assert np.linalg.norm(merged_N.astype(np.float64)) == pytest.approx(norms_E @ [0.25, 0.25, 0.5], rel=1e-6)
    doubled_N = merge("multislerp", stack, [2, 2, 4], normalize=False)
    np.testing.assert_allclose(doubled_N, 8 * merged_N, rtol=1e-6)


def test_directions_that_cancel_are_merged_linearly() -> None:
    stack = np.float32([[3, 0], [-1, 0], [0, 2], [0, -1]])
    np.testing.assert_allclose(merge("multislerp", stack), [0.5, 0.25], atol=1e-7)


@given(strategies.stacks(exact=True), st.data())
def test_karcher_minimises_the_squared_angles(stack: np.ndarray, data: st.DataObject) -> None:
    weights = data.draw(numbers(len(stack)))
    lengths = np.linalg.norm(stack.astype(np.float64), axis=1)
    assume(lengths.any())
    assume((cosines(stack)[np.ix_(lengths > 0, lengths > 0)] > 0.1).all())  # in one half, where there is one minimum
    wanted_N = reference.karcher(stack.astype(np.float64), weights)
    merged_N = merge("karcher", stack, weights, max_iter=200, tol=1e-9)
    np.testing.assert_allclose(merged_N, wanted_N, rtol=0, atol=tolerance(stack))


def test_karcher_differs_from_the_normalised_mean() -> None:
    """Of three unit vectors of which two are near each other, the mean of angles lies elsewhere than the mean of vectors."""
    stack = np.float32([[1, 0, 0], [math.cos(0.1), math.sin(0.1), 0], [math.cos(1.4), math.sin(1.4), 0]])
    angle = (0 + 0.1 + 1.4) / 3
    np.testing.assert_allclose(merge("karcher", stack, max_iter=50, tol=1e-9), [math.cos(angle), math.sin(angle), 0], atol=1e-6)
    none_N = merge("karcher", stack, max_iter=0)
    np.testing.assert_allclose(none_N, merge("multislerp", stack), atol=1e-6)
    assert abs(math.atan2(none_N[1], none_N[0]) - angle) > 0.005


def test_opposite_experts_leave_a_karcher_mean() -> None:
    stack = np.float32([[2, 0], [-4, 0]])
    np.testing.assert_allclose(merge("karcher", stack, [3, 1]), [2.5, 0], atol=1e-6)
    np.testing.assert_allclose(merge("karcher", stack), [3, 0], atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@given(stack=strategies.stacks(rows=1))
def test_equal_experts_give_that_expert(method: str, stack: np.ndarray) -> None:
    merged_N = merge(method, np.repeat(stack, 2, axis=0))
    np.testing.assert_allclose(merged_N, stack[0], rtol=2**-21, atol=2**-140 + 2**-23 * float(np.abs(stack).max()))


@pytest.mark.parametrize("method", METHODS)
@given(stack=strategies.stacks(rows=3, exact=True))
def test_the_base_is_an_origin(method: str, stack: np.ndarray) -> None:
    """Task vectors on the grid are exact, so they are merged as the weights of models on a base of zeros are."""
    tau_EN = stack[1:] - stack[0]
    merged_N = merge_tensor(method, stack[0], stack[1:], origin="base")
    wanted_N = stack[0] + merge_tensor(method, np.zeros_like(stack[0]), tau_EN, origin="base")
    assert_same_bits(merged_N, wanted_N)
    np.testing.assert_array_equal(merge_tensor(method, np.zeros_like(stack[0]), tau_EN, origin="base"), merge(method, tau_EN))


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
@given(stack=strategies.stacks(rows=3, exact=True), random=st.randoms())
def test_the_order_of_experts_hardly_matters(method: str, stack: np.ndarray, random: Random) -> None:
    cosines_EE = cosines(stack)
    assume((cosines_EE > -0.2).all())
    shuffled = np.stack(random.sample(list(stack), 3))
    np.testing.assert_allclose(merge(method, shuffled), merge(method, stack), rtol=0, atol=tolerance(stack, 10))


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_base_is_named(method: str) -> None:
    with pytest.raises(InputError, match="base"):
        moerge.merge_state_dicts(None, [{}, {}], method=method, origin="base")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge("nuslerp", np.ones((3, 2), np.float32)), "nuslerp merges exactly 2 state dicts, not 3"),
        (lambda: merge("nuslerp", np.ones((2, 2), np.float32), vectors="rows"), "vectors"),
        (lambda: merge("karcher", np.ones((2, 2), np.float32), tol=0.0), "tol"),
        (lambda: merge("karcher", np.ones((2, 2), np.float32), [1, -1]), "sum to zero"),
        (lambda: merge("multislerp", np.ones((2, 2), np.float32), origin="mean"), "origin"),
    ],
)
def test_bad_settings_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises((InputError, TypeError), match=message):
        call()
