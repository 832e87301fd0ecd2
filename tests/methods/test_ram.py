from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from tests.helpers import reference, strategies
from tests.methods.one_tensor import assert_same_bits, merge_tensor

EPSILONS = st.sampled_from([0.0, 1e-5, 1 / 64, 1.0, 3.0])
NUMBERS = st.floats(0, 2)


@given(strategies.stacks(exact=True), EPSILONS)
def test_ram_is_the_formula(tau_EN: np.ndarray, epsilon: float) -> None:
    merged_N = merge_tensor("ram", np.zeros_like(tau_EN[0]), tau_EN, epsilon=epsilon)
    np.testing.assert_allclose(merged_N, reference.ram(tau_EN.astype(np.float64), epsilon), rtol=1e-6, atol=1e-6)


@given(strategies.stacks(exact=True), EPSILONS, NUMBERS, NUMBERS)
def test_ram_plus_is_the_formula(tau_EN: np.ndarray, epsilon: float, r: float, alpha: float) -> None:
    merged_N = merge_tensor("ramplus_tl", np.zeros_like(tau_EN[0]), tau_EN, epsilon=epsilon, r=r, alpha=alpha)
    wanted_N = reference.ram(tau_EN.astype(np.float64), epsilon, r=r, alpha=alpha)
    np.testing.assert_allclose(merged_N, wanted_N, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
@given(stack=strategies.stacks(rows=3, exact=True), scale=strategies.scales())
def test_the_base_is_added_and_the_scale_multiplies(method: str, stack: np.ndarray, scale: float) -> None:
    exact = stack.astype(np.float64)
    plus = {"r": 0.1, "alpha": 0.2} if method == "ramplus_tl" else {}
    wanted_N = exact[0] + scale * reference.ram(exact[1:] - exact[0], 1e-5, **plus)
    np.testing.assert_allclose(merge_tensor(method, stack[0], stack[1:], scale=scale), wanted_N, rtol=1e-5, atol=1e-5)


@given(strategies.stacks(rows=3, exact=True))
def test_without_r_ram_plus_is_ram(stack: np.ndarray) -> None:
    assert_same_bits(merge_tensor("ramplus_tl", stack[0], stack[1:], r=0.0), merge_tensor("ram", stack[0], stack[1:]))


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
@given(stack=strategies.stacks(rows=2, exact=True))
def test_equal_experts_give_that_expert(method: str, stack: np.ndarray) -> None:
    np.testing.assert_array_equal(merge_tensor(method, stack[0], np.repeat(stack[1:], 2, axis=0)), stack[1])


def test_a_known_case() -> None:
    tau_EN = np.float32([[4, 0, 2, 0, 1e-6], [0, 2, 4, 0, 2]])
    zeros_N = np.zeros(5, np.float32)
    np.testing.assert_array_equal(merge_tensor("ram", zeros_N, tau_EN), [4, 2, 3, 0, 2])
    # shared / own: 1 / 1 and 1 / 2
    np.testing.assert_allclose(merge_tensor("ramplus_tl", zeros_N, tau_EN, r=0.1, alpha=2.0), [4.4, 2.1, 3, 0, 2.1], rtol=1e-6)
    np.testing.assert_allclose(merge_tensor("ramplus_tl", zeros_N, tau_EN, r=0.1, alpha=0.2), [4.08, 2.04, 3, 0, 2.04], rtol=1e-6)


def test_the_model_is_counted_as_a_whole() -> None:
    base = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    experts = [
        {"a": np.float32([4, 0]), "b": np.float32([2, 2])},
        {"a": np.float32([0, 4]), "b": np.float32([4, 4])},
    ]
    merged = moerge.merge_state_dicts(base, experts, method="ramplus_tl", r=0.1, alpha=3.0, scope="model")
    np.testing.assert_allclose(merged["a"], [4 * 1.2, 4 * 1.2], rtol=1e-6)  # two shared, one own
    merged = moerge.merge_state_dicts(base, experts, method="ramplus_tl", r=0.1, alpha=3.0)
    np.testing.assert_array_equal(merged["a"], [4, 4])
    np.testing.assert_array_equal(merged["b"], [3, 3])


def test_threads_change_nothing() -> None:
    stack = np.random.default_rng(0).standard_normal((3, 1 << 21)).astype(np.float32)
    stack[:, ::3] = 0
    one, three = (merge_tensor("ramplus_tl", stack[0], stack[1:], threads=n, epsilon=0.5) for n in (1, 3))
    assert_same_bits(one, three)


def test_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"^ram ignores weights: use 'linear', or leave them out$"):
        moerge.merge_state_dicts({}, [{}, {}], method="ram", weights=[1, 2])
