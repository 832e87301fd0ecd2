"""The router fit against finite differences, scipy's minimiser and cases that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from moerge.reduction.router_fit import divergence, fit_router, gradient, softmax

TOKENS, WIDTH, EXPERTS = 200, 5, 4


def inputs(seed: int = 0) -> np.ndarray:
    """Router inputs."""
    return np.random.default_rng(seed).standard_normal((TOKENS, WIDTH))


def weights(seed: int) -> np.ndarray:
    """A router."""
    return np.random.default_rng(seed).standard_normal((EXPERTS, WIDTH))


def test_the_gradient_is_that_of_finite_differences() -> None:
    target_TE, weight_ED = softmax(2 * np.random.default_rng(3).standard_normal((TOKENS, EXPERTS))), weights(1)
    exact_ED, step = gradient(weight_ED, inputs(), target_TE), 1e-5
    for place in np.ndindex(weight_ED.shape):
        moved = np.zeros_like(weight_ED)
        moved[place] = step
        slope = (divergence(weight_ED + moved, inputs(), target_TE) - divergence(weight_ED - moved, inputs(), target_TE)) / (
            2 * step
        )
        assert exact_ED[place] == pytest.approx(slope, abs=1e-7)


def test_a_router_that_is_in_reach_is_found_up_to_a_common_row() -> None:
    right_ED = weights(2)
    fit = fit_router(weights(3), inputs(), softmax(inputs() @ right_ED.T))
    found_ED = fit.weight_ED - fit.weight_ED.mean(axis=0)
    np.testing.assert_allclose(found_ED, right_ED - right_ED.mean(axis=0), atol=1e-3)
    assert fit.before > 0.1 and fit.after < 1e-6


def test_the_start_stays_where_it_is_right() -> None:
    fit = fit_router(weights(2), inputs(), softmax(inputs() @ weights(2).T))
    assert fit.after <= fit.before < 1e-12
    np.testing.assert_allclose(softmax(inputs(9) @ fit.weight_ED.T), softmax(inputs(9) @ weights(2).T), atol=1e-6)


def test_the_optimum_is_that_of_scipy() -> None:
    target_TE = softmax(np.random.default_rng(5).standard_normal((15, EXPERTS)))  # too few to hold any out
    few_TD = inputs()[:15]
    fit = fit_router(weights(6), few_TD, target_TE)
    other = minimize(
        lambda flat: divergence(flat.reshape(EXPERTS, WIDTH), few_TD, target_TE),
        weights(6).ravel(),
        jac=lambda flat: gradient(flat.reshape(EXPERTS, WIDTH), few_TD, target_TE).ravel(),
    )
    assert fit.after == pytest.approx(other.fun, rel=1e-4)


def test_the_sum_of_absorbed_probabilities_is_closer_than_the_row_of_one_member() -> None:
    """Two experts with the same row: what is left needs their common logit plus ln 2, which no row gives but a fit nears."""
    rng = np.random.default_rng(0)
    rows_ED = rng.standard_normal((3, WIDTH)) + 0.0
    shifted_TD = inputs() + np.array([2.0, 0, 0, 0, 0])  # inputs have a mean, so a row can make a constant, nearly
    probabilities_TE = softmax(shifted_TD @ rows_ED[[0, 0, 1, 2]].T)
    target_TE = np.stack([probabilities_TE[:, :2].sum(axis=1), *probabilities_TE[:, 2:].T], axis=1)
    fit = fit_router(rows_ED, shifted_TD, target_TE)
    assert fit.after < 0.7 * fit.before
    assert divergence(fit.weight_ED, shifted_TD, target_TE) < divergence(rows_ED, shifted_TD, target_TE)


def test_noise_that_only_the_fitted_tokens_have_does_not_make_it_worse() -> None:
    target_TE = softmax(6 * np.random.default_rng(8).standard_normal((40, EXPERTS)))
    many_TD = np.random.default_rng(1).standard_normal((40, 30))
    fit = fit_router(np.zeros((EXPERTS, 30)), many_TD, target_TE)
    assert fit.after <= fit.before
