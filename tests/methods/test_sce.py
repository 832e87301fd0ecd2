from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from moerge.methods import magnitude
from tests.helpers import reference, strategies
from tests.methods.one_tensor import merge_tensor

TOPK = st.sampled_from([0.05, 0.1, 0.5, 0.75, 1.0])


def sce(tau_EN: np.ndarray, select_topk: float, **settings: float) -> np.ndarray:
    return merge_tensor("sce", np.zeros_like(tau_EN[0]), tau_EN, select_topk=select_topk, **settings)


@given(strategies.stacks(exact=True), TOPK)
def test_it_is_the_formula(tau_EN: np.ndarray, select_topk: float) -> None:
    np.testing.assert_allclose(sce(tau_EN, select_topk), reference.sce(tau_EN, select_topk), rtol=2e-6, atol=1e-6)


@given(strategies.stacks(rows=3, exact=True), TOPK, strategies.scales())
def test_the_scale_multiplies_and_the_base_is_added(stack: np.ndarray, select_topk: float, scale: float) -> None:
    exact = stack.astype(np.float64)
    expected_N = exact[0] + scale * reference.sce(stack[1:] - stack[0], select_topk)
    merged_N = merge_tensor("sce", stack[0], stack[1:], select_topk=select_topk, scale=scale)
    np.testing.assert_allclose(merged_N, expected_N, rtol=1e-5, atol=1e-4)


@given(strategies.stacks(rows=3, exact=True), st.randoms())
def test_the_order_of_experts_hardly_matters(tau_EN: np.ndarray, random: Random) -> None:
    shuffled = np.stack(random.sample(list(tau_EN), 3))
    np.testing.assert_allclose(sce(shuffled, 1.0), sce(tau_EN, 1.0), rtol=1e-5, atol=1e-5)


@given(strategies.stacks(rows=1, exact=True))
def test_one_expert_is_itself_if_all_is_selected_and_the_base_otherwise(tau_EN: np.ndarray) -> None:
    np.testing.assert_array_equal(sce(tau_EN, 1.0), tau_EN[0])
    np.testing.assert_array_equal(sce(tau_EN, 0.9), np.zeros_like(tau_EN[0]))


@given(strategies.stacks(rows=1), TOPK)
def test_experts_that_are_the_base_give_the_base(stack: np.ndarray, select_topk: float) -> None:
    merged_N = merge_tensor("sce", stack[0], np.repeat(stack, 3, axis=0), select_topk=select_topk)
    np.testing.assert_array_equal(merged_N, stack[0])


@given(strategies.stacks(rows=2, exact=True, max_size=60), st.sampled_from([0.1, 0.5, 0.9]))
def test_the_selected_count_is_the_fraction_of_what_varies(tau_EN: np.ndarray, select_topk: float) -> None:
    variance_N = tau_EN.var(axis=0)
    assume(len(np.unique(variance_N)) == variance_N.size)
    selected = int(np.count_nonzero(variance_N) * round(select_topk * 10) // 10)
    order_N = np.argsort(variance_N)[::-1]
    dropped_N = order_N[selected:]
    assert not sce(tau_EN, select_topk)[dropped_N].any()
    assert (sce(tau_EN, select_topk) != 0).sum() <= selected


def test_a_known_case() -> None:
    tau_EN = np.float32([[2, 1, 0, 4], [1, -3, 0, 4]])
    eta_E = np.float64([21, 26]) / 47
    expected_N = [eta_E[0] * 2 + eta_E[1] * 1, -3, 0, 4]
    np.testing.assert_allclose(sce(tau_EN, 1.0), expected_N, rtol=1e-6)
    # variances 0.25, 4, 0, 0: of two that vary, half is one
    np.testing.assert_allclose(sce(tau_EN, 0.5), [0, -3, 0, 0], rtol=1e-6)


def test_small_task_vectors_are_weighed_by_energy_too() -> None:
    """mergekit falls back to equal weights below a mean square of 1e-6."""
    tau_EN = np.float32([[3e-4, 3e-4], [1e-4, 1e-4]])
    np.testing.assert_allclose(sce(tau_EN, 1.0), [0.9 * 3e-4 + 0.1 * 1e-4] * 2, rtol=1e-6)


def test_large_tensors_are_selected_from_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a million entries a sample brackets the smallest variance that is selected."""
    monkeypatch.setattr(magnitude, "_LARGE", 1000)
    tau_EN = np.random.default_rng(0).standard_normal((2, 300_000)).astype(np.float32)
    np.testing.assert_allclose(sce(tau_EN, 0.1), reference.sce(tau_EN, 0.1), rtol=2e-6, atol=1e-6)


def test_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"^sce ignores weights: use 'linear', or leave them out$"):
        moerge.merge_state_dicts({}, [{}, {}], method="sce", weights=[1, 2])
