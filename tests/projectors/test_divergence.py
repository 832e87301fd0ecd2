"""The search for a map with the least divergence: derivatives against differences, and where it ends."""

from __future__ import annotations

import numpy as np
import pytest

from moerge.projectors.divergence import HeadMatching, least_divergence
from moerge.projectors.proj_out import COVERED, held_out, predicted
from moerge.tensors.dtypes import F32
from moerge.tensors.linalg import log_softmax
from moerge.tensors.tables import Table
from moerge.tensors.tensor import ArrayTensor


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def problem(states: int, *, seed: int = 0, head: np.ndarray | None = None) -> HeadMatching:
    """Twelve tokens, a shared width of five, states of width three and the constant."""
    shared, own, bias = draw(1, 12, 5), draw(2, 12, 3) if head is None else head, draw(3, 12)
    state = np.concatenate([draw(10 + seed, states, 3), np.ones((states, 1))], axis=1)
    return HeadMatching(shared, bias, state, log_softmax(state[:, :3] @ own.T))


def test_the_divergence_is_kullback_s() -> None:
    heads, change = problem(7), draw(4, 5, 4)
    total = 0.0
    for state, log_p in zip(heads.state_SD, heads.log_p_SK, strict=True):
        logits = heads.shared_KM @ change @ state + heads.bias_K
        q = np.exp(logits) / np.exp(logits).sum()
        total += float((np.exp(log_p) * (log_p - np.log(q))).sum())
    assert heads.divergence(change) == pytest.approx(total / 7, rel=1e-12)


def test_slope_and_curve_are_its_derivatives() -> None:
    heads, change, direction, small = problem(300), draw(4, 5, 4), draw(5, 5, 4), 1e-5
    gradient, q = heads.gradient(change)
    ahead, behind = heads.divergence(change + small * direction), heads.divergence(change - small * direction)
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / (2 * small), rel=1e-6)
    numeric = (heads.gradient(change + small * direction)[0] - heads.gradient(change - small * direction)[0]) / (2 * small)
    np.testing.assert_allclose(heads.hessian_vector_product(direction, q), numeric, atol=1e-8)


def test_it_finds_a_map_that_exists() -> None:
    """From far away, in few enough steps: the curvature is what it is preconditioned with, nearly."""
    shared = problem(1).shared_KM
    mixing, push = draw(6, 5, 3), np.linalg.lstsq(shared, -problem(1).bias_K, rcond=None)[0]
    heads, unseen = (problem(n, seed=seed, head=shared @ mixing) for n, seed in ((400, 1), (100, 2)))
    heads, unseen = (HeadMatching(shared, shared @ push, each.state_SD, each.log_p_SK) for each in (heads, unseen))
    found = least_divergence(heads, unseen, np.zeros((5, 4)), np.cov(shared.T))
    assert unseen.divergence(np.zeros((5, 4))) > 0.5
    assert unseen.divergence(found) < 1e-4


def test_it_stays_where_it_is_best() -> None:
    """Held-out states never get worse, even if the others are few and misleading."""
    few, unseen = problem(3, seed=1), problem(200, seed=2)
    start = least_divergence(problem(4000, seed=3), unseen, np.zeros((5, 4)), np.eye(5))
    after = least_divergence(few, unseen, start, np.eye(5))
    assert unseen.divergence(after) <= unseen.divergence(start) < unseen.divergence(np.zeros((5, 4)))


def test_threads_change_nothing() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from moerge.tensors.threads import single_threaded_blas

    heads, unseen = problem(900, seed=1), problem(300, seed=2)
    with single_threaded_blas(), ThreadPoolExecutor(3) as pool:
        together = HeadMatching(heads.shared_KM, heads.bias_K, heads.state_SD, heads.log_p_SK, pool.map)
        results = [least_divergence(each, unseen, np.zeros((5, 4)), np.eye(5)) for each in (heads, together)]
    assert results[0].tobytes() == results[1].tobytes()


def test_predicted_tokens_cover_the_probability() -> None:
    """1,300 tokens, so that logits come in several blocks; half of them are hardly ever predicted."""
    head, states, bias = draw(1, 1300, 6).astype(np.float32), draw(2, 50, 6).astype(np.float32), np.zeros(1300)
    bias[::2] = -20
    table = Table(ArrayTensor("head", F32, head.shape, head.reshape(-1)), "math")
    chosen, log_p = predicted(table, states, bias)
    full = log_softmax(states @ head.T + bias)
    mean = np.exp(full).mean(axis=0)
    assert (np.diff(chosen) > 0).all() and (chosen % 2 == 1).all()
    assert mean[chosen].sum() >= COVERED > np.sort(mean[chosen])[1:].sum()
    np.testing.assert_allclose(log_p, log_softmax(full[:, chosen]), atol=1e-4)


def test_every_fifth_text_is_held_out() -> None:
    assert held_out(np.array([0, 0, 3, 4, 4, 5, 9])).tolist() == [False, False, False, True, True, False, True]
    assert held_out(np.zeros(10, int)).tolist() == [False] * 8 + [True] * 2
    assert held_out(np.array([4, 4, 4, 9, 9])).tolist() == [False] * 4 + [True]  # no other text to learn from
