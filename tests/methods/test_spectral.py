"""TSV-M, Iso-C and Iso-CTS: against NumPy's own decomposition, and where that leaves the result open."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from moerge.methods import spectral
from tests.helpers import reference, strategies
from tests.methods.one_tensor import assert_same_bits, merge_tensor

METHODS: dict[str, dict[str, Any]] = {"tsv_m": {}, "iso_c": {}, "iso_cts": {"common_space_fraction": 0.6}}
SHAPES = [(12, 12), (9, 31), (31, 9), (1, 7), (7, 1), (4, 1)]
CASES = [
    (name, shape, experts)
    for name in METHODS
    for shape in SHAPES
    for experts in (1, 2, 3)
    if name != "tsv_m" or experts <= min(shape)  # the paper's rank would be zero
]
RANDOM = np.random.default_rng(3)


def expected(name: str, tau_EOI: np.ndarray) -> np.ndarray:
    if name == "tsv_m":
        return reference.tsv_m(tau_EOI)
    return reference.iso_c(tau_EOI) if name == "iso_c" else reference.iso_cts(tau_EOI, 0.6)


def combined(name: str, tau_EOI: np.ndarray, **settings: Any) -> np.ndarray:
    """The merged task vector."""
    return merge_tensor(name, np.zeros_like(tau_EOI[0]), tau_EOI, **METHODS[name], **settings)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("name", "shape", "experts"), CASES)
def test_matrices_of_full_rank_are_merged_by_the_formula(name: str, shape: tuple[int, int], experts: int) -> None:
    tau_EOI = normal(experts, *shape)
    np.testing.assert_allclose(combined(name, tau_EOI), expected(name, tau_EOI.astype(np.float64)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_base_scale_and_weights(name: str) -> None:
    base, tau_EOI = normal(6, 8), normal(2, 6, 8)
    exact = (base + tau_EOI).astype(np.float64) - base
    merged = merge_tensor(name, base, base + tau_EOI, scale=0.5, weights=[2, -0.5], **METHODS[name])
    wanted = base + 0.5 * expected(name, exact * np.array([2, -0.5])[:, None, None])
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@given(stack=strategies.stacks(rows=3, exact=True))
def test_vectors_get_the_mean(name: str, stack: np.ndarray) -> None:
    mean_N = stack[0] + (stack[1] - stack[0] + (stack[2] - stack[0])) / np.float32(2)
    assert_same_bits(merge_tensor(name, stack[0], stack[1:], **METHODS[name]), mean_N)
    cube = stack.reshape(3, 1, 1, -1)
    assert_same_bits(merge_tensor(name, cube[0], cube[1:], **METHODS[name]).reshape(-1), mean_N)


@pytest.mark.parametrize("name", METHODS)
@given(stack=strategies.stacks(rows=1), data=st.data())
def test_experts_that_are_the_base_give_the_base(name: str, stack: np.ndarray, data: st.DataObject) -> None:
    base = stack[0].reshape(-1, data.draw(strategies.columns(stack.shape[1])))
    np.testing.assert_array_equal(merge_tensor(name, base, np.stack([base] * 3), **METHODS[name]), base)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(["mixed", "one row", "equal", "bfloat16"]), st.integers(0, 99))
def test_a_single_expert_is_itself_under_tsv_m(rows: int, columns: int, kind: str, seed: int) -> None:
    tau = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    if kind == "one row":
        tau[1:] = 0
    elif kind == "equal":
        tau[:] = tau[0, 0]
    elif kind == "bfloat16":
        tau = strategies.bfloat16(tau)
    np.testing.assert_allclose(combined("tsv_m", tau[None]), tau, rtol=1e-5, atol=1e-6)


def test_iso_c_makes_all_singular_values_their_mean() -> None:
    tau_EOI = normal(3, 20, 30)
    values = np.linalg.svd(combined("iso_c", tau_EOI), compute_uv=False)
    np.testing.assert_allclose(values, np.linalg.svd(tau_EOI.sum(axis=0), compute_uv=False).mean(), rtol=1e-5)


def test_a_common_space_that_is_everything_makes_iso_cts_iso_c() -> None:
    tau_EOI = normal(3, 10, 14)
    merged = merge_tensor("iso_cts", np.zeros_like(tau_EOI[0]), tau_EOI, common_space_fraction=1)
    np.testing.assert_allclose(merged, combined("iso_c", tau_EOI), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_experts_hardly_matters(name: str) -> None:
    tau_EOI = normal(3, 10, 14)
    np.testing.assert_allclose(combined(name, tau_EOI[[2, 0, 1]]), combined(name, tau_EOI), rtol=0, atol=1e-5)


def test_tsv_m_of_low_rank_task_vectors_adds_up_what_does_not_overlap() -> None:
    """Published code fills the rest of each task's share with arbitrary vectors, which bend the others' when orthogonalised."""
    left, right = np.linalg.qr(normal(16, 16))[0], np.linalg.qr(normal(24, 24))[0]
    first = 3 * np.outer(left[:, 0], right[:, 0]) + np.outer(left[:, 1], right[:, 1])
    second = 2 * np.outer(left[:, 2], right[:, 2])
    merged = combined("tsv_m", np.stack([first, second]).astype(np.float32))
    np.testing.assert_allclose(merged, first + second, rtol=0, atol=1e-5)


def test_tsv_m_of_equal_experts_is_their_larger_half_once() -> None:
    tau = normal(8, 12)
    left, values, right = np.linalg.svd(tau.astype(np.float64), full_matrices=False)
    half = left[:, :4] * values[:4] @ right[:4]
    np.testing.assert_allclose(combined("tsv_m", np.stack([tau, tau])), half, rtol=0, atol=1e-5)


def test_iso_c_leaves_zero_directions_zero() -> None:
    tau = np.zeros((4, 6), np.float32)
    tau[0, 0], tau[1, 1] = 3, 1
    np.testing.assert_allclose(combined("iso_c", tau[None]), np.sign(tau) * (3 + 1) / 4, rtol=0, atol=1e-6)


def test_opposite_experts_cancel_in_iso_c() -> None:
    tau = normal(4, 6)
    np.testing.assert_array_equal(combined("iso_c", np.stack([tau, -tau])), np.zeros_like(tau))


@pytest.mark.parametrize("name", METHODS)
def test_wide_spectra_are_decomposed_as_precisely_as_float32_allows(name: str) -> None:
    left, right = np.linalg.qr(normal(40, 40))[0], np.linalg.qr(normal(60, 60))[0]
    values = np.geomspace(1, 1e-4, 40)
    tau_EOI = np.stack([left * values @ right[:40], np.roll(left, 1, axis=0) * values @ right[20:]]).astype(np.float32)
    np.testing.assert_allclose(combined(name, tau_EOI), expected(name, tau_EOI.astype(np.float64)), rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", METHODS)
def test_matrices_of_many_pieces_are_those_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tau_EOI = normal(2, 30, 50)
    whole = combined(name, tau_EOI)
    monkeypatch.setattr(spectral, "_CHUNK", 100)
    np.testing.assert_allclose(combined(name, tau_EOI), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_is_the_float32_result_rounded_once(name: str) -> None:
    stack = normal(3, 12, 10).astype(ml_dtypes.bfloat16)
    wide = merge_tensor(name, stack[0].astype(np.float32), stack[1:].astype(np.float32), **METHODS[name])
    np.testing.assert_array_equal(merge_tensor(name, stack[0], stack[1:], **METHODS[name]), wide.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", METHODS)
def test_allowed_nans_end_in_nans(name: str) -> None:
    tau_EOI = normal(2, 3, 4)
    tau_EOI[1, 1, 2] = np.nan
    assert np.isnan(combined(name, tau_EOI, allow_nonfinite=True)[1, 2])


def test_a_bad_fraction_is_named() -> None:
    with pytest.raises(InputError) as error:
        moerge.merge_state_dicts({}, [{}], method="iso_cts", common_space_fraction=1.5)
    message = "common_space_fraction should be less than or equal to 1, not 1.5"
    assert str(error.value) == f"merge_state_dicts(method='iso_cts'): {message}"
