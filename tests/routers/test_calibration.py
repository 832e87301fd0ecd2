"""HARC's fit: against a dense solve, finite differences, scipy, and the cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad, minimize

from moerge.routers.calibration import Routed, agreement, divergence, fit_gate, kl_curvature, kl_gradient

E, H = 4, 6


def make_sources(count: int, seed: int = 0, tokens: int = 200, *, apart: float = 0.5) -> list[Routed]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((E, H))
    return [
        Routed(rng.standard_normal((tokens + 30 * d, H)) + d, base + apart * rng.standard_normal((E, H))) for d in range(count)
    ]


def centred(gate: np.ndarray) -> np.ndarray:
    """A router without what no softmax sees."""
    return np.asarray(gate - gate.mean(axis=0))


def brute_kl(sources: list[Routed], gate: np.ndarray) -> float:
    """The objective as its formula reads."""
    total = 0.0
    for source in sources:
        for x in source.states_TH:
            p, q = (np.exp(w @ x) / np.exp(w @ x).sum() for w in (source.gate_EH, gate))
            total += float((p * np.log(p / q)).sum()) / len(source.states_TH)
    return total


def test_the_objective_and_its_derivatives() -> None:
    sources, at = make_sources(2), np.random.default_rng(3).standard_normal((E, H))
    assert divergence(sources, at) == pytest.approx(brute_kl(sources, at), rel=1e-10)
    flat = lambda w: divergence(sources, w.reshape(E, H))  # noqa: E731
    assert check_grad(flat, lambda w: kl_gradient(sources, w.reshape(E, H)).ravel(), at.ravel()) < 1e-5
    basis = np.eye(E * H).reshape(-1, E, H)
    hessian = np.stack([kl_curvature(sources, at, v).ravel() for v in basis])
    step = 1e-6
    numeric = np.stack(
        [(kl_gradient(sources, at + step * v) - kl_gradient(sources, at - step * v)).ravel() / (2 * step) for v in basis]
    )
    np.testing.assert_allclose(hessian, numeric, atol=1e-6)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    assert np.linalg.matrix_rank(hessian, tol=1e-9) == (E - 1) * H


def test_one_source_gives_its_router_back() -> None:
    (source,) = make_sources(1)
    start = np.random.default_rng(5).standard_normal((E, H))
    fitted = fit_gate([source], start, newton=20)
    np.testing.assert_allclose(centred(fitted), centred(source.gate_EH), atol=1e-4)
    np.testing.assert_allclose(fitted.mean(axis=0), start.mean(axis=0), atol=1e-10)
    assert agreement(source, fitted, 2).overlap > 0.999


def test_equal_sources_give_their_router_back() -> None:
    one, two = make_sources(2)
    same = [one, Routed(two.states_TH, one.gate_EH)]
    fitted = fit_gate(same, one.gate_EH + 0.3, newton=1)
    np.testing.assert_allclose(centred(fitted), centred(one.gate_EH), atol=1e-8)


def test_the_minimum_is_scipys() -> None:
    sources = make_sources(3, apart=1.0)
    start = np.mean([source.gate_EH for source in sources], axis=0)
    fitted = fit_gate(sources, start, newton=15)
    flat = minimize(
        lambda w: divergence(sources, w.reshape(E, H)),
        start.ravel(),
        jac=lambda w: kl_gradient(sources, w.reshape(E, H)).ravel(),
        method="BFGS",
        options={"gtol": 1e-9},
    )
    assert divergence(sources, fitted) == pytest.approx(flat.fun, rel=1e-7)
    assert divergence(sources, fitted) < divergence(sources, start)


def test_harcs_own_step_solves_its_normal_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    from moerge.routers import calibration

    sources, start = make_sources(2, apart=0.05), np.zeros((E, H))
    for gamma in (1.0, 0.9):
        monkeypatch.setattr(calibration, "_SHRINK", gamma)
        total, target = np.zeros((E * H, E * H)), np.zeros(E * H)
        for source in sources:
            a = np.zeros((E * H, E * H))
            for x in source.states_TH:
                p = np.exp(source.gate_EH @ x) / np.exp(source.gate_EH @ x).sum()
                a += np.kron(np.diag(p) - np.outer(p, p), np.outer(x, x)) / len(source.states_TH)
            a = gamma * a + (1 - gamma) * np.diag(np.diag(a))
            total, target = total + a, target + a @ source.gate_EH.ravel()
        dense = np.linalg.lstsq(total, target, rcond=None)[0].reshape(E, H)
        monkeypatch.setattr(calibration, "_descend", lambda s, gate, step: gate + step)
        fitted = fit_gate(sources, start, newton=0, iterations=1000)
        np.testing.assert_allclose(centred(fitted), centred(dense), atol=1e-4)


def test_overlap_counts_tokens_with_the_same_set() -> None:
    source = Routed(np.eye(3), np.array([[3.0, 0, 1], [2, 1, 0], [1, 2, 3]]))
    other = np.array([[2.0, 0, 1], [3, 1, 0], [1, 2, 3]])
    assert agreement(source, other, 2).overlap == 1 and agreement(source, other, 1).overlap == pytest.approx(2 / 3)
