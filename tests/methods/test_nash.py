"""Nash weights: against scipy, and the properties that the equation has."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

import moerge
from moerge.errors import InputError
from moerge.methods.nash import bargain
from tests.helpers.tiny import make_models, read_values


def vectors(experts: int, seed: int, size: int = 30) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal(size)
    return np.asarray(rng.standard_normal((experts, size)) * rng.uniform(0.1, 5, (experts, 1)) + 0.3 * shared)


@given(st.integers(1, 8), st.integers(0, 200))
def test_the_solution_satisfies_its_equation(experts: int, seed: int) -> None:
    tau = vectors(experts, seed)
    gram = tau @ tau.T
    alpha = bargain(gram)
    assert (alpha > 0).all()
    np.testing.assert_allclose(alpha * (gram @ alpha), 1, rtol=1e-9)
    delta = alpha @ tau
    assert delta @ delta == pytest.approx(experts, rel=1e-9)
    assert (tau @ delta > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_scipy_finds_the_same(seed: int) -> None:
    tau = vectors(4, seed)
    gram = tau @ tau.T
    start = 1 / np.sqrt(np.diag(gram))
    found = minimize(
        lambda log: 0.5 * np.exp(log) @ gram @ np.exp(log) - log.sum(),
        np.log(start),
        jac=lambda log: np.exp(log) * (gram @ np.exp(log)) - 1,
        method="BFGS",
        options={"gtol": 1e-12},
    )
    np.testing.assert_allclose(bargain(gram), np.exp(found.x), rtol=1e-6)


@given(st.integers(2, 6), st.integers(0, 100), st.floats(1e-3, 1e3))
def test_scaling_and_order(experts: int, seed: int, factor: float) -> None:
    tau = vectors(experts, seed)
    alpha, scaled, order = bargain(tau @ tau.T), tau.copy(), np.random.default_rng(seed).permutation(experts)
    scaled[0] *= factor
    other = bargain(scaled @ scaled.T)
    np.testing.assert_allclose(other[0] * factor, alpha[0], rtol=1e-8)
    np.testing.assert_allclose(other[1:], alpha[1:], rtol=1e-8)
    np.testing.assert_allclose(bargain((tau @ tau.T)[np.ix_(order, order)]), alpha[order], rtol=1e-8)


def test_orthogonal_and_repeated_vectors() -> None:
    tau = np.diag([1.0, 4.0, 0.5])
    np.testing.assert_allclose(bargain(tau @ tau.T), [1, 0.25, 2])
    twice = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
    alpha = bargain(twice @ twice.T)
    assert alpha[:2].sum() / alpha[2] == pytest.approx(np.sqrt(2))


def test_an_unchanged_expert_takes_no_part() -> None:
    tau = np.array([[2.0, 0], [0, 0], [0, 1.0]])
    np.testing.assert_allclose(bargain(tau @ tau.T), [0.5, 0, 1])


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_vectors_that_cancel_are_refused(experts: int) -> None:
    tau = vectors(experts, 1)
    centred = tau - tau.mean(axis=0)
    with pytest.raises(InputError, match="cancel"):
        bargain(centred @ centred.T)


@pytest.mark.parametrize(("scope", "length"), [("tensor", "mean"), ("role", "mean"), ("model", "mean"), ("tensor", "sum")])
def test_a_merge_against_the_formula(scope: str, length: str, tmp_path: Path) -> None:
    models = make_models(tmp_path, dtype="F32")
    experts = {name: str(folder) for name, folder in models.items() if name != "base"}
    merge = {"method": "nash", "scope": scope, "length": length, "scale": 0.7}
    moerge.merge({"base": str(models["base"]), "experts": experts, "merge": merge}, tmp_path / "out")
    base, sources, merged = (
        read_values(models["base"]),
        [read_values(models[name]) for name in experts],
        read_values(tmp_path / "out"),
    )
    taus = {name: np.stack([s[name].ravel() - base[name].ravel() for s in sources]).astype(np.float64) for name in base}
    spans = {"tensor": lambda name: name, "role": lambda name: re.sub(r"\d+", "", name), "model": lambda name: ""}
    for name, tau in taus.items():
        span = spans[scope]
        spanned = np.concatenate([tau for other, tau in taus.items() if span(other) == span(name)], axis=1)
        alpha = bargain(spanned @ spanned.T)
        longest = np.linalg.norm(spanned.sum(axis=0)) / np.linalg.norm(alpha @ spanned)
        weights = alpha / alpha.sum() if length == "mean" else alpha * longest
        wanted = base[name].ravel() + 0.7 * (weights @ tau)
        np.testing.assert_allclose(merged[name].ravel(), wanted, rtol=1e-5, atol=1e-6)


def test_the_mean_as_base_is_refused(tmp_path: Path) -> None:
    models = make_models(tmp_path, dtype="F32", experts=("a", "b"), base=False)
    experts = {name: str(folder) for name, folder in models.items()}
    moerge.merge({"experts": experts, "merge": {"method": "average"}}, tmp_path / "mean")
    with pytest.raises(InputError, match="cancel"):
        moerge.merge({"base": str(tmp_path / "mean"), "experts": experts, "merge": {"method": "nash"}}, tmp_path / "out")
