"""Folding against the papers' own formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.reduction.folding import ExpertWeights, fitted_down, joint_subspace, neuron_order, weighted

WIDTH, NEURONS = 6, 9


def expert(seed: int) -> ExpertWeights:
    """Random matrices."""
    rng = np.random.default_rng(seed)
    return ExpertWeights(*(rng.standard_normal(shape) for shape in ((NEURONS, WIDTH), (NEURONS, WIDTH), (WIDTH, NEURONS))))


def activations(own: ExpertWeights, inputs_TD: np.ndarray) -> np.ndarray:
    """silu(gate x) * up x."""
    gate_TF = inputs_TD @ own.gate_FD.T
    return gate_TF / (1 + np.exp(-gate_TF)) * (inputs_TD @ own.up_FD.T)


def outputs(own: ExpertWeights, inputs_TD: np.ndarray) -> np.ndarray:
    """The expert's function."""
    return activations(own, inputs_TD) @ own.down_DF.T


def test_neurons_in_another_order_are_the_same_function() -> None:
    inputs_TD, order_F = np.random.default_rng(0).standard_normal((5, WIDTH)), np.random.default_rng(1).permutation(NEURONS)
    np.testing.assert_allclose(outputs(expert(2).permuted(order_F), inputs_TD), outputs(expert(2), inputs_TD), atol=1e-12)


@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_permuted_copy_folds_back_into_the_expert(with_tokens: bool) -> None:
    inputs_TD = np.random.default_rng(0).standard_normal((40, WIDTH))
    centre = expert(3)
    member = centre.permuted(np.random.default_rng(4).permutation(NEURONS))
    seen = (activations(centre, inputs_TD), activations(member, inputs_TD)) if with_tokens else (None, None)
    aligned = member.permuted(neuron_order(centre, member, *seen))
    for folded, own in zip(weighted([centre, aligned], [0.3, 0.7]), centre, strict=True):
        np.testing.assert_allclose(folded, own, atol=1e-12)
    blind = weighted([centre, member], [0.3, 0.7])
    assert np.abs(outputs(blind, inputs_TD) - outputs(centre, inputs_TD)).max() > 0.1


@given(st.integers(2, 4), st.integers(1, WIDTH), st.integers(0, 50))
def test_the_joint_subspace_is_the_published_svd(count: int, rank: int, seed: int) -> None:
    """Sub-MoE: W_m = U_r S_r (sum_i w_i V_i)^T of [W_1 .. W_n] = U S [V_1 .. V_n]^T; here the average, projected on U_r."""
    rng = np.random.default_rng(seed)
    matrices = [rng.standard_normal((WIDTH, NEURONS)) for _ in range(count)]
    weights = rng.random(count) + 0.1
    weights /= weights.sum()
    left_OM, values_M, right_MN = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
    blocks = np.split(right_MN[:rank], count, axis=1)
    published = left_OM[:, :rank] * values_M[:rank] @ sum(w * block for w, block in zip(weights, blocks, strict=True))
    average = sum(w * matrix for w, matrix in zip(weights, matrices, strict=True))
    basis_OR = joint_subspace(matrices, rank)
    np.testing.assert_allclose(basis_OR @ (basis_OR.T @ average), published, atol=1e-9)
    if rank == WIDTH:
        np.testing.assert_allclose(published, average, atol=1e-9)


def test_the_whitened_subspace_is_the_svd_on_inputs() -> None:
    """Sub-MoE's second variant: the SVD of [W_1 S_1 .. W_n S_n] with S S^T = C, and V_i^T taken back by S_i^-1."""
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal((WIDTH, NEURONS)) for _ in range(3)]
    inputs = [rng.standard_normal((50, NEURONS)) * rng.random(NEURONS) for _ in range(3)]
    grams = [x.T @ x for x in inputs]
    factors = [np.linalg.cholesky(gram) for gram in grams]
    weights, rank = np.array([0.2, 0.5, 0.3]), 3
    whole = np.concatenate([m @ s for m, s in zip(matrices, factors, strict=True)], axis=1)
    left_OM, values_M, right_MN = np.linalg.svd(whole, full_matrices=False)
    blocks = np.split(right_MN[:rank], 3, axis=1)
    back = [block @ np.linalg.inv(s) for block, s in zip(blocks, factors, strict=True)]
    published = left_OM[:, :rank] * values_M[:rank] @ sum(w * block for w, block in zip(weights, back, strict=True))
    average = sum(w * matrix for w, matrix in zip(weights, matrices, strict=True))
    basis_OR = joint_subspace(matrices, rank, grams)
    np.testing.assert_allclose(basis_OR @ (basis_OR.T @ average), published, atol=1e-9)


@given(st.integers(0, 50), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_a_fitted_down_projection_is_never_worse_than_the_average(seed: int, ridge: float) -> None:
    inputs_TD = np.random.default_rng(seed).standard_normal((60, WIDTH))
    members, weights = [expert(seed), expert(seed + 1)], [0.6, 0.4]
    average = weighted(members, weights)
    target_TD = sum(w * outputs(m, inputs_TD) for w, m in zip(weights, members, strict=True))
    seen_TF = activations(average, inputs_TD)
    fitted_DF = fitted_down(average.down_DF, target_TD, seen_TF, ridge)
    assert np.linalg.norm(seen_TF @ fitted_DF.T - target_TD) < np.linalg.norm(seen_TF @ average.down_DF.T - target_TD)


def test_without_ridge_it_is_mergemoe_and_with_much_of_it_the_average() -> None:
    inputs_TD = np.random.default_rng(5).standard_normal((60, WIDTH))
    members, weights = [expert(5), expert(6)], [0.6, 0.4]
    average = weighted(members, weights)
    seen_FT = activations(average, inputs_TD).T
    stacked = np.concatenate([activations(m, inputs_TD).T for m in members])
    published_DF = np.concatenate([w * m.down_DF for w, m in zip(weights, members, strict=True)], axis=1) @ (
        stacked @ np.linalg.pinv(seen_FT)
    )
    target_TD = sum(w * outputs(m, inputs_TD) for w, m in zip(weights, members, strict=True))
    np.testing.assert_allclose(fitted_down(average.down_DF, target_TD, seen_FT.T, 0.0), published_DF, atol=1e-8)
    np.testing.assert_allclose(fitted_down(average.down_DF, target_TD, seen_FT.T, 1e12), average.down_DF, atol=1e-8)


def test_equal_gates_and_ups_make_the_fit_exact() -> None:
    inputs_TD = np.random.default_rng(7).standard_normal((60, WIDTH))
    first = expert(8)
    second = first._replace(down_DF=expert(9).down_DF)
    target_TD = 0.5 * outputs(first, inputs_TD) + 0.5 * outputs(second, inputs_TD)
    fitted_DF = fitted_down(first.down_DF, target_TD, activations(first, inputs_TD), 0.0)
    np.testing.assert_allclose(fitted_DF, (first.down_DF + second.down_DF) / 2, atol=1e-8)
